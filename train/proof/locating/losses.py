"""The loss of a microbatch, a single number, and its gradient, which is the weight of each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from train.config.fields import IGNORE_INDEX
from train.config.strategy import BATCH_AXES
from train.proof.apart import separating_axes
from train.proof.locating.finding import Guess, Kind
from train.proof.locating.kinds import SAME, error_of, factors, fitted
from train.proof.locating.layout import Judged, Part, Sizes, parts
from train.proof.locating.reference import Reference
from train.proof.locating.trace import Key, Trace


@dataclass(frozen=True)
class JudgedLoss(Judged):
    """`right`: what it should be. `num_valid`: its tokens that have a loss."""

    right: float = math.nan
    num_valid: int = 0


def judge_loss(
    rank: int, key: Key, value: Tensor, side: str, trace: Trace, reference: Reference, sizes: Sizes
) -> Judged:
    """A rank's loss is the sum over the tokens of which it has the targets."""
    if side == "backward":
        right = reference.backward["loss"][0]
        piece = value / trace.gradient_scale
        return JudgedLoss(rank, key, piece, Part((), ()), error_of(piece, right, right), float(right))
    name = "loss:targets"
    targets, whole = trace.forward.get((name, key[1])), reference.forward[name]
    choices = [] if targets is None else [*parts(name, whole, targets, (name, key[1]), trace, sizes)]
    if targets is None or not choices:
        return Judged(rank, key, value, None, math.inf)
    part = min(choices, key=lambda part: error_of(targets, part.of(whole), whole))
    right, num_valid = part.of(reference.token_losses).sum(), int((part.of(whole) != IGNORE_INDEX).sum())
    return JudgedLoss(rank, key, value, Part((), part.axes), error_of(value, right, right), float(right), num_valid)


def guess_of_loss(
    side: str,
    judged: list[Judged],
    heads: list[Judged],
    places: list[dict[str, int]],
    reference: Reference,
    sizes: Sizes,
    num_microbatches: int,
) -> Guess:
    """A factor; or the logarithm of a degree in every token, if a sum over the vocabulary counts copies; or what the
    maximum of a rank's own shard of the vocabulary gives. `heads`: the gradients of the logits."""
    losses = [one for one in judged if isinstance(one, JudgedLoss) and one.right]
    numbers = [float(one.piece) / one.right for one in losses]
    if not numbers:
        return Guess(Kind.unknown)
    if max(numbers) - min(numbers) <= SAME * abs(numbers[0]):
        number = numbers[0]
        return factors(number, sizes, num_microbatches) or Guess(Kind.factor, (), f"times {number:.4g}")
    slopes = {(one.rank, one.key[1]): slope_of(one, reference) for one in heads}
    if side == "backward" or all(
        abs(slopes.get((one.rank, one.key[1]), math.inf) - number) <= SAME * abs(number)
        for one, number in zip(losses, numbers, strict=True)
    ):
        shown = ", ".join(f"rank {one.rank}: {number:.4g}" for one, number in zip(losses[:4], numbers, strict=False))
        by_rank: dict[int, list[float]] = {}
        for one, number in zip(losses, numbers, strict=True):
            by_rank.setdefault(one.rank, []).append(number)
        within = any(max(of_one) - min(of_one) > SAME * max(of_one) for of_one in by_rank.values())
        axes = varying_axes(losses, numbers, places)
        if within:  # then data ranks, which have other microbatches, differ too
            axes = tuple(axis for axis in axes if axis not in BATCH_AXES)
        what = "other numbers in other microbatches" if within else "other numbers on other ranks"
        return Guess(Kind.factor, axes, f"times {what}: {shown}")
    more = [(float(one.piece) - one.right) / max(one.num_valid, 1) for one in losses]
    counted = [
        axis
        for axis, degree in sizes.degrees.items()
        if degree > 1 and all(abs(each - math.log(degree)) <= SAME for each in more)
    ]
    if counted:  # `tp` splits the vocabulary, whose exponentials are summed
        named = ("tp",) if "tp" in counted else tuple(counted)
        degree = sizes.degrees[named[0]]
        return Guess(Kind.counted_again, named, f"every token's loss is larger by the logarithm of {degree}")
    if (tp := sizes.degrees["tp"]) > 1:
        logits, targets = reference.forward["head"].double(), reference.forward["loss:targets"]
        found = sum(float(one.piece) for one in losses if places[one.rank]["tp"] == 0 and places[one.rank]["cp"] == 0)
        if abs(found - with_own_maxima(logits, targets, tp)) <= SAME * abs(found):
            return Guess(Kind.own_part, ("tp",), "each rank subtracts the maximum of its own shard of the logits")
    return Guess(Kind.unknown)


def slope_of(one: Judged, reference: Reference) -> float:
    """The number by which the gradient of the logits is multiplied."""
    return math.nan if one.part is None else fitted(one.piece, one.part.of(reference.backward["head"]))


def with_own_maxima(logits: Tensor, targets: Tensor, degree: int) -> float:
    """The sum of losses if every shard of the vocabulary subtracts its own maximum from its logits."""
    shards = logits.split(-(-logits.shape[-1] // degree), -1)
    shifted = torch.cat([shard - shard.amax(-1, keepdim=True) for shard in shards], -1)
    return float(cross_entropy(shifted.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"))


def varying_axes(losses: list[JudgedLoss], numbers: list[float], places: list[dict[str, int]]) -> tuple[str, ...]:
    """The axes along which ranks have other numbers for the same microbatch."""
    numbered = list(zip(losses, numbers, strict=True))
    return separating_axes(
        (places[one.rank], places[other.rank])
        for one, number in numbered
        for other, another in numbered
        if one.key == other.key and abs(number - another) > SAME * abs(number)
    )
