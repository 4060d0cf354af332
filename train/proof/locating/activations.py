"""The first wrong activation in forward order, or the first wrong gradient of one in backward order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from train.config.strategy import MESH_AXES
from train.proof.apart import separating_axes
from train.proof.locating import kinds, modules
from train.proof.locating.finding import Box, Finding, Guess, Kind
from train.proof.locating.kinds import Wrong, error_of
from train.proof.locating.layout import Judged, Sizes, likely, parts, whole_shape
from train.proof.locating.losses import guess_of_loss, judge_loss
from train.proof.locating.reference import Reference
from train.proof.locating.trace import Key, Trace
from train.strategies.tensor.mixture import PARTIAL_GRADIENTS, PARTIAL_OUTPUTS

SIDES = ("forward", "backward")
OF_KV_HEADS = (".wk", ".wv", ".kernel:k", ".kernel:v")
WHAT = {"forward": "activation", "backward": "gradient"}


class Activations:
    """`traces`: those of all ranks of a strategy, in their order."""

    def __init__(self, reference: Reference, traces: Sequence[Trace], sizes: Sizes, num_microbatches: int) -> None:
        self.reference, self.traces, self.sizes, self.num_microbatches = reference, traces, sizes, num_microbatches
        self.judged = {side: self._judge(side) for side in SIDES}

    def first_wrong(self) -> Finding | None:
        for side in SIDES:
            names = self.reference.order if side == "forward" else list(reversed(self.reference.order))
            for name in names:
                wrong = self.wrong(side, name)
                if wrong:
                    return self._finding(side, name, wrong)
        return None

    def boxes(self) -> tuple[Box, ...]:
        return tuple(
            Box(name, self._largest("forward", name), self._largest("backward", name)) for name in self.names()
        )

    def names(self) -> list[str]:
        return [name for name in self.reference.order if any(name in self.judged[side] for side in SIDES)]

    def wrong(self, side: str, name: str) -> list[Judged]:
        scale = self.reference.scales.get((side, name), 0.0)
        return [one for one in self.judged[side].get(name, []) if not self._error(side, one) <= scale]

    def _largest(self, side: str, name: str) -> tuple[float, float] | None:
        judged = self.judged[side].get(name)
        if not judged:
            return None
        return max(self._error(side, one) for one in judged), self.reference.scales[side, name]

    def _judge(self, side: str) -> dict[str, list[Judged]]:
        wholes = self.reference.wholes(side)
        found: dict[str, list[Judged]] = {}
        for rank, trace in enumerate(self.traces):
            recorded = trace.forward if side == "forward" else trace.backward
            for key, value in recorded.items():
                if (whole := wholes.get(key[0])) is not None:
                    one = self._judge_piece(rank, key, value, whole, side)
                    found.setdefault(key[0], []).append(one)
        return found

    def _judge_piece(self, rank: int, key: Key, value: Tensor, whole: Tensor, side: str) -> Judged:
        trace, name = self.traces[rank], key[0]
        if name == "loss":
            return judge_loss(rank, key, value, side, trace, self.reference, self.sizes)
        length = value.shape[0] // trace.micro_batch_size if name.endswith(".dispatch") else 0
        piece = whole_shape(name, value, length)
        if side == "backward":
            piece = piece / trace.gradient_scale
        found = [
            (error_of(piece, part.of(whole), whole), part)
            for part in parts(name, whole, piece, key, trace, self.sizes)
            if not (self._is_term(side, name) and "tp" in part.axes)
        ]
        error, part = min(found, key=lambda one: one[0], default=(float("inf"), None))
        return Judged(rank, key, piece, part, error)

    def _is_partial(self, side: str, name: str) -> bool:
        """Whether a tp rank has a term of a sum that is completed later: in a mixture, or if ranks share KV heads."""
        tp = self.sizes.degrees["tp"]
        shared = side == "backward" and tp > self.reference.config.model.num_kv_heads and name.endswith(OF_KV_HEADS)
        return shared or self._is_term(side, name)

    def _is_term(self, side: str, name: str) -> bool:
        """Whether this is of a mixture under tp, where a rank has such a term of all its tokens and of no part of them.
        Its values cannot tell where it belongs: it is far from every part of the whole."""
        names = PARTIAL_OUTPUTS if side == "forward" else PARTIAL_GRADIENTS
        return self.sizes.degrees["tp"] > 1 and name.endswith(names)

    def _error(self, side: str, one: Judged) -> float:
        """The error of a piece; where ranks have terms of a sum, that of the sum over tp ranks with the same part."""
        whole = self.reference.wholes(side)[one.key[0]]
        if one.part is None or not self._is_partial(side, one.key[0]):
            return one.error
        terms = [
            other.piece
            for other in self._peers(side, one, "tp")
            if other.part is not None and other.part.same(one.part)
        ]
        return error_of(torch.stack(terms).sum(0), one.part.of(whole), whole)

    def _peers(self, side: str, one: Judged, axis: str) -> list[Judged]:
        """The pieces, for the same microbatch, of the ranks that differ from this one along the axis alone."""
        place = self.traces[one.rank].place
        return [
            other
            for other in self.judged[side][one.key[0]]
            if other.key == one.key
            and all(self.traces[other.rank].place[a] == place[a] for a in MESH_AXES if a != axis)
        ]

    def _finding(self, side: str, name: str, wrong: list[Judged]) -> Finding:
        scale = self.reference.scales[side, name]
        guess = self._guess(side, name, wrong, scale)
        if not guess.axes:
            guess = Guess(guess.kind, self._likely_axes(side, name, wrong, guess), guess.because)
        ranks = tuple(sorted({one.rank for one in wrong}))
        error = max(self._error(side, one) for one in wrong)
        return Finding(name, WHAT[side], guess, ranks, error, scale)

    def _guess(self, side: str, name: str, judged: list[Judged], scale: float) -> Guess:
        whole = self.reference.wholes(side)[name]
        if any(one.part is None for one in judged):
            shapes = {tuple(one.piece.shape) for one in judged if one.part is None}
            return Guess(
                Kind.unknown, (), f"no part of {tuple(whole.shape)} has the shape {' or '.join(map(str, shapes))}"
            )
        if name == "loss":
            places = [trace.place for trace in self.traces]
            heads = self.judged["backward"].get("head", [])
            return guess_of_loss(side, judged, heads, places, self.reference, self.sizes, self.num_microbatches)
        wrong = [
            Wrong(name, one.rank, one.key[1], one.piece, one.part, whole, scale)
            for one in judged
            if one.part is not None
        ]
        terms = self.reference.forward_terms if side == "forward" else self.reference.backward_terms
        by_wrong = {(one.rank, one.key[1]): one for one in judged}

        def peers(one: Wrong, axis: str) -> list[Tensor]:
            return [peer.piece for peer in self._peers(side, by_wrong[one.rank, one.microbatch], axis)]

        def guesses() -> Iterator[Guess | None]:
            if whole.is_floating_point():
                yield kinds.as_factor(wrong, self.sizes, self.num_microbatches)
                yield kinds.as_own_part(wrong, peers, self.sizes)
                yield kinds.as_sum(wrong, terms(name, self.sizes.degrees))
                if side == "forward":
                    yield modules.as_unmasked_rows(wrong, self.reference, self.sizes)
                    yield modules.as_old_weights(wrong, self.reference)
                else:
                    yield modules.as_auxiliary(wrong, self.reference, self.sizes, self.num_microbatches)
            yield kinds.as_stale(wrong)
            yield kinds.as_positions(wrong)
            if side == "forward" and ".kernel" in name:
                yield (
                    modules.as_rotation(wrong, self.reference)
                    if ":" in name
                    else modules.as_mask(wrong, self.reference, self.sizes)
                )
            yield kinds.as_rounding(wrong)

        return kinds.first_guess(guesses()) or Guess(Kind.unknown)

    def _likely_axes(self, side: str, name: str, wrong: list[Judged], guess: Guess) -> tuple[str, ...]:
        """Axes that separate wrong ranks from right ones; else those that the kind and the place speak for."""
        bad = {one.rank for one in wrong}
        good = {one.rank for one in self.judged[side][name]} - bad
        if apart := separating_axes((self.traces[a].place, self.traces[b].place) for a in bad for b in good):
            return apart
        if guess.kind is Kind.factor:  # the same number on all ranks, which is no degree
            return ()
        if guess.kind is Kind.stale and self.sizes.degrees["pp"] > 1:  # what a stage has received
            return ("pp",)
        if guess.kind is Kind.stale and self.reference.first:
            return ()
        if self.sizes.ep > 1 and ".feed_forward." in name:
            return ("ep",)
        split = tuple(dict.fromkeys(axis for one in wrong if one.part is not None for axis in one.part.axes))
        return split or likely(self.sizes)
