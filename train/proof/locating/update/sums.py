"""The gradient of a parameter as a sum over ranks and microbatches: which terms of it a wrong gradient has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config.shapes import token_dim
from train.config.strategy import BATCH_AXES
from train.proof.locating.finding import Guess, Kind
from train.proof.locating.kinds import SAME, error_of, explains, factors, fitted
from train.proof.locating.layout import Judged, Sizes
from train.proof.locating.reference import READERS, Reference
from train.strategies.context.apply import positions_of

MICROBATCH = "microbatch"
SAMPLES = 20_000  # numbers of a gradient from which the weights of its terms are computed


@dataclass(frozen=True)
class Place:
    """Where a term of a gradient comes from: a place on the axes over which tokens are split, and a microbatch."""

    sizes: Sizes
    num_microbatches: int

    @property
    def axes(self) -> dict[str, int]:
        split = {axis: n for axis in (*BATCH_AXES, "cp", "tp") if (n := self.sizes.degrees[axis]) > 1}
        return split | ({MICROBATCH: self.num_microbatches} if self.num_microbatches > 1 else {})

    def tokens(self, at: dict[str, int], batch: int) -> tuple[Tensor, Tensor]:
        """The rows and the positions of the term at a place."""
        index = 0
        for axis in BATCH_AXES:
            index = index * self.sizes.degrees[axis] + at.get(axis, 0)
        size = batch // math.prod(self.sizes.degrees[axis] for axis in BATCH_AXES)
        rows = torch.arange(index * size, (index + 1) * size).chunk(self.num_microbatches)[at.get(MICROBATCH, 0)]
        positions = positions_of(at.get("cp", 0), self.sizes.degrees["cp"], self.sizes.seq_len)
        if "tp" not in at:
            return rows, positions
        degree = self.sizes.degrees["tp"]
        if token_dim(len(rows), degree) == 0:
            return rows.chunk(degree)[at["tp"]], positions
        return rows, positions.chunk(degree)[at["tp"]]

    def sums(self, values: Tensor, axis: str) -> list[float]:
        """The sums of values [B, T] over the tokens of every rank of an axis."""
        indices = (self.tokens({axis: i}, len(values)) for i in range(self.axes[axis]))
        return [float(values[torch.meshgrid(*index, indexing="ij")].sum()) for index in indices]


def own_terms(name: str, reference: Reference, place: Place) -> dict[tuple[int, ...], Tensor] | None:
    """The terms of the gradient of this parameter, by place; None if the trace does not give them."""
    module, layer = name.removesuffix(".weight"), name.partition(".feed_forward.")[0]
    mixture = reference.config.model.num_experts > 0 and ".feed_forward." in name
    if (f"{layer}.feed_forward" if mixture else module) not in reference.backward:
        return None
    batch, found = reference.config.train.global_batch_size, {}
    for numbers in itertools.product(*(range(n) for n in place.axes.values())):
        rows, positions = place.tokens(dict(zip(place.axes, numbers, strict=True)), batch)
        index = torch.meshgrid(rows, positions, indexing="ij")
        found[numbers] = reference.mixture_gradients(layer, index)[name] if mixture else _term(module, reference, index)
    return found


def _term(module: str, reference: Reference, index: tuple[Tensor, ...]) -> Tensor:
    grad = reference.backward[module][index].double().flatten(0, 1)
    if module == "embed":
        tokens = reference.forward["embed:tokens"][index].flatten()
        return torch.zeros(reference.config.model.vocab_size, grad.shape[1]).double().index_add(0, tokens, grad)
    if module.rpartition(".")[2] in ("attention_norm", "feed_forward_norm", "norm"):
        return (grad * reference.forward[module][index].double().flatten(0, 1)).sum(0)  # norms' weights are 1 at first
    x = reference.input_features(module, reference.forward[reference.input_of(module)])
    return grad.T @ x[index].double().flatten(0, 1)


def guess(name: str, found: Tensor, right: Tensor, reference: Reference, place: Place, scale: float) -> Guess:
    """The kind of mistake in a parameter's gradient."""
    number = fitted(found, right)
    error = error_of(found, right, right)
    scaled = error_of(found, right.double() * number, right) if number == number else error
    if abs(number - 1) > SAME and explains(scaled, error, scale):
        return factors(number, place.sizes, place.num_microbatches) or Guess(Kind.factor, (), f"times {number:.4g}")
    if name == "embed.weight" and reference.config.model.tie_embeddings:
        return of_tied(found, right, reference, place, scale)
    terms = own_terms(name, reference, place)
    if terms and len(terms) > 1:
        chosen = torch.randperm(found.numel(), generator=torch.Generator().manual_seed(0))[:SAMPLES]
        columns = torch.stack([term.flatten()[chosen] for term in terms.values()], 1)
        values = found.double().flatten()[chosen]
        weights = torch.linalg.lstsq(columns, values.unsqueeze(1), driver="gelsd").solution.squeeze(1)
        apart = float((columns @ weights - values).abs().max() / right.abs().max())
        if explains(apart, error, scale, 64):
            shape = tuple(place.axes.values())
            return of_weights(weights.view(shape), tuple(place.axes), place)
    return Guess(Kind.unknown)


def of_own_rank(name: str, found: Tensor, reference: Reference, pieces: Sequence[Judged], scale: float) -> Guess | None:
    """Ranks share rows of the weight, as those of a KV head do, and the gradient is that of one of them alone.
    `pieces`: of the gradient of the module's output, on all ranks."""
    module = name.removesuffix(".weight")
    if module.rpartition(".")[2] not in READERS:
        return None
    own: dict[tuple[int, ...], dict[int, Tensor]] = {}
    x = reference.input_features(module, reference.forward[reference.input_of(module)]).double()
    for one in pieces:
        if one.part is None:
            return None
        rows, positions, features = one.part.index
        seen = x[torch.meshgrid(rows, positions, indexing="ij")].flatten(0, 1)
        of_rank = own.setdefault(tuple(features.tolist()), {})
        of_rank[one.rank] = of_rank.get(one.rank, 0) + one.piece.double().flatten(0, 1).T @ seen
    blocks = [(found.double()[list(rows)], terms) for rows, terms in own.items()]
    largest = found.double().abs().max()
    for block, terms in blocks:
        if len(terms) < 2 or all((block - term).abs().max() > 64 * scale * largest for term in terms.values()):
            return None
    return Guess(Kind.own_part, ("tp",), "ranks share its rows, and it has the part of one of them") if blocks else None


def of_tied(found: Tensor, right: Tensor, reference: Reference, place: Place, scale: float) -> Guess:
    """A tied weight's gradient is the sum of that of its use as an embedding and that of its use as a head."""
    everything = torch.meshgrid(
        torch.arange(reference.config.train.global_batch_size), torch.arange(place.sizes.seq_len), indexing="ij"
    )
    uses = {use: _term(use, reference, everything) for use in ("embed", "head")}
    axes = ("pp",) if place.sizes.degrees["pp"] > 1 else ()
    for use, term in uses.items():
        number = fitted(found, term)
        if error_of(found, term * number, right) <= 64 * scale:
            return Guess(Kind.own_part, axes, f"it is the gradient of its use in {use} alone")
    rest, head = found.double() - uses["embed"], uses["head"]
    matched = head[torch.cdist(rest, head).argmin(1)]
    if error_of(rest, matched, right) <= 64 * scale:
        return Guess(Kind.positions, axes, "rows of the two uses are added to other rows")
    return Guess(Kind.unknown, axes)


def of_weights(weights: Tensor, axes: tuple[str, ...], place: Place) -> Guess:
    """What the weights of the terms say; each should be 1. `weights` has a dimension for each of the axes."""
    rounded = (weights * 1000).round() / 1000
    varying = [i for i in range(rounded.ndim) if (rounded - rounded.select(i, 0).unsqueeze(i)).abs().max() > 2e-3]
    named = tuple(axes[i] for i in varying if axes[i] != MICROBATCH)
    if len(varying) > 1 and all(abs(float(w)) < 2e-3 or abs(float(w) - 1) < 2e-3 for w in rounded.flatten()):
        return Guess(Kind.part_missing, named, "the terms of some ranks and microbatches are missing")
    if not varying and axes and abs(float(rounded.flatten()[0]) - 1) < 2e-3:
        return Guess(Kind.unknown)
    if axes and all(float(w) >= 1 - 2e-3 and abs(float(w) - round(float(w))) < 2e-3 for w in rounded.flatten()):
        counts = sorted({round(float(w)) for w in rounded.flatten()})
        return Guess(Kind.counted_again, named, f"its terms count {' or '.join(map(str, counts))} times")
    if len(varying) != 1:
        mean = f"its terms are multiplied by {sorted({round(float(w), 3) for w in rounded.flatten()})[:4]}"
        return Guess(Kind.factor, named, mean)
    (dim,) = varying
    line = rounded.movedim(dim, 0).reshape(rounded.shape[dim], -1)[:, 0]
    axis, zeros = axes[dim], [i for i, value in enumerate(line) if abs(float(value)) < 2e-3]
    if zeros and axis == MICROBATCH:
        return Guess(Kind.part_missing, (), f"the terms of the microbatches {', '.join(map(str, zeros))} are missing")
    if zeros and len(zeros) == len(line) - 1:
        kept = next(i for i in range(len(line)) if i not in zeros)
        return Guess(Kind.own_part, named, f"of {len(line)} terms it has that of rank {kept} of {axis} alone")
    if len(zeros) == 1:
        return Guess(Kind.part_missing, named, f"the term of rank {zeros[0]} of {axis} is missing")
    return Guess(Kind.factor, named, f"the terms along {axis} are multiplied by {[round(float(x), 3) for x in line]}")
