"""What AdamW steps leave on every rank, and the gradients of the second, against one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from train.proof.apart import separating_axes
from train.proof.collecting import ADAMW_LR, Watch
from train.proof.comparison import Verdict
from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.kinds import error_of, fitted
from train.proof.locating.update.updates import Updates
from train.ranks.state import Piece

# AdamW moves a weight by about the learning rate, whatever the size of its gradient. If rounding decides the sign of a
# very small gradient, the weight moves the other way. So weights are compared as a whole: by the root of the mean
# square of the error relative to the learning rate. LEAST_MOVE is never called wrong, nor FLIPS times what one device
# with moved inputs has, in this tensor or in all together. In bf16, moved inputs turn 0.2 to 0.4 % of the weights
# around (0.10 to 0.13), and right strategies 0.13 to 0.25 %, at most 0.8 % of a matrix. In one tensor they are so few
# that one run has some where another has none, and one of the 48 numbers of a norm is an error of 0.29: so the FEW
# largest errors of a piece do not count. What is wrong with the weights alone, such as their rate or their decay, is
# wrong in all. After later steps, moments have such moves in them: they may differ LATER times as much as after the
# first.
LEAST_MOVE, FLIPS, FEW, LATER = 0.02, 4.0, 4, 1000.0
Whole = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class WrongPiece:
    """A piece that is wrong on `ranks`."""

    piece: Piece
    right: Tensor
    error: float
    scale: float
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class AdamW:
    """The AdamW steps. `ranks`: what the ranks of the strategy have recorded; `one`, `moved`: what one device has,
    without and with moved inputs."""

    updates: Updates
    ranks: Sequence[Watch]
    one: Watch
    moved: Watch

    def first_wrong(self, step: int) -> Finding | None:
        """Moments, buffers or else weights after the first (0) or the last (-1) step."""
        if "adamw_loss" in self.updates.plan.config.differs():
            return None
        whole = {(one.name, one.kind): one.tensor for one in self.one.held[step]}
        apart = {(one.name, one.kind): error_of_piece(one, whole, few=0) for one in self.moved.held[step]}
        moves = [(apart[one.name, one.kind], one.tensor.numel()) for one in self.moved.held[step] if is_weight(one)]
        together = (sum(error**2 * n for error, n in moves) / sum(n for _, n in moves)) ** 0.5
        for weights in (False, True):
            wrong = [
                WrongPiece(piece, part_of(whole[key], piece), error, scale, (rank,))
                for rank, watch in enumerate(self.ranks)
                for piece in watch.held[step]
                if is_weight(piece) == weights
                and (key := (piece.name, piece.kind)) in whole
                and (error := error_of_piece(piece, whole))
                > (scale := self._scale(apart.get(key, 0.0), step, together if weights else None))
            ]
            if wrong:
                return self._of_pieces(wrong)
        return None

    def wrong_copies(self) -> Finding | None:
        """Gradients of which some ranks have a wrong copy, while others have a right one. AdamW's first moment after
        the first step is a multiple of the gradient, the same on all ranks."""
        whole = {(one.name, one.kind): one.tensor for one in self.one.held[0]}
        copies: dict[tuple[str, tuple[int, ...]], list[WrongPiece]] = {}
        for rank, watch in enumerate(self.ranks):
            for piece in watch.held[0]:
                known = (piece.name, piece.kind) in whole
                if known and piece.kind == "exp_avg" and piece.tensor.ndim == len(piece.offset):
                    right = part_of(whole[piece.name, piece.kind], piece)
                    number = fitted(piece.tensor, right)
                    error = error_of(piece.tensor, right.double() * number, right) if number == number else 0.0
                    scale = max(self.updates.scale(0.0) * LATER, self.updates.lossy)
                    copies.setdefault((piece.name, piece.offset), []).append(
                        WrongPiece(piece, right, error, scale, (rank,))
                    )
        for held in copies.values():
            wrong = [one for one in held if one.error > one.scale]
            if wrong and len(wrong) < len(held):
                ranks = tuple(rank for one in wrong for rank in one.ranks)
                guess = self._of_gradient(wrong[0], ranks, {rank for one in held for rank in one.ranks} - {*ranks})
                verdict = Verdict("gradients", wrong[0].piece.name, wrong[0].error, wrong[0].scale)
                return self.updates.found_at("gradients", verdict, guess, ranks)
        return None

    def _scale(self, moved: float, step: int, together: float | None) -> float:
        """What rounding explains. `together`: what moved inputs do to all weights, if it is about a weight. A gradient
        that is sent with less precision may change the sign of as large a share of its numbers."""
        if together is not None:
            return max(LEAST_MOVE, FLIPS * max(moved, together), 4 * self.updates.lossy**0.5)
        return max(self.updates.scale(moved) * (LATER if step else 1), self.updates.lossy)

    def _of_pieces(self, wrong: list[WrongPiece]) -> Finding:
        worst = max(wrong, key=lambda one: one.error)
        piece = worst.piece
        ranks = tuple(sorted({rank for one in wrong for rank in one.ranks}))
        name = piece.name if piece.kind == "parameter" else f"{piece.name} {piece.kind}"
        where = {"parameter": "weights", "buffer": piece.name.rpartition(".")[0]}.get(piece.kind, "moments")
        verdict = Verdict(where, name, worst.error, worst.scale)
        everywhere = len(ranks) == self.updates.plan.world_size
        return self.updates.found_at(where, verdict, self._guess(worst, where), () if everywhere else ranks)

    def _guess(self, wrong: WrongPiece, where: str) -> Guess:
        number = fitted(wrong.piece.tensor, wrong.right)
        if (
            number == number
            and error_of(wrong.piece.tensor, wrong.right.double() * number, wrong.right) <= 4 * wrong.scale
        ):
            return self.updates.factor(number)
        return Guess(Kind.unknown, self.updates.likely(wrong.piece.name) if where in ("moments", "weights") else ())

    def _of_gradient(self, wrong: WrongPiece, ranks: tuple[int, ...], right_copies: set[int]) -> Guess:
        traces = self.updates.first.traces
        axes = separating_axes((traces[a].place, traces[b].place) for a in ranks for b in right_copies)
        name, right = wrong.piece.name, self.updates.right.gradients[wrong.piece.name]
        if right.shape != wrong.piece.tensor.shape:
            return Guess(Kind.unknown, axes)
        share = fitted(wrong.right, right)  # what AdamW has multiplied the gradient by
        guess = self.updates.guess(name, wrong.piece.tensor.double() / share, right, 4 * wrong.scale)
        return Guess(guess.kind, guess.axes if guess.kind is not Kind.unknown and guess.axes else axes, guess.because)

    def second_step(self, second: Activations) -> Finding | None:
        """The activations of the second step, or else its gradients. They are not compared for a strategy that is
        expected to differ after the first step."""
        differs = self.updates.plan.config.differs()
        if differs.keys() & {"gradients", "adamw_loss"}:
            return None
        return second.first_wrong() or self._second_gradients()

    def _second_gradients(self) -> Finding | None:
        found, right, moved = (watch.second_gradients for watch in (self.ranks[0], self.one, self.moved))
        for name in reversed([*right]):
            error = error_of(found[name], right[name], right[name])
            scale = max(self.updates.scale(error_of(moved[name], right[name], right[name])) * LATER, self.updates.lossy)
            if error > scale:
                more, before = found[name].double() - right[name].double(), self.updates.right.gradients[name].double()
                number = fitted(more, before)
                stale = error_of(more, before * number, right[name]) <= 64 * scale
                because = f"{number:.3g} times the gradient of the step before is added to it"
                guess = Guess(Kind.stale, (), because) if stale else Guess(Kind.unknown, self.updates.likely(name))
                return self.updates.found_at("gradients", Verdict("gradients", name, error, scale), guess)
        return None


def is_weight(piece: Piece) -> bool:
    return piece.kind == "parameter"


def error_of_piece(piece: Piece, whole: Whole, few: int = FEW) -> float:
    """0 for a tensor that one device does not have, and for a flat part of a split weight's moment. `few`: so many of
    the largest errors of a weight do not count."""
    right = whole.get((piece.name, piece.kind))
    if right is None or len(piece.offset) > piece.tensor.ndim:
        return 0.0
    if not is_weight(piece):
        return error_of(piece.tensor, part_of(right, piece), right)
    apart = (piece.tensor.double() - part_of(right, piece).double()).abs().flatten() / ADAMW_LR
    if not apart.isfinite().all():
        return float("inf")
    largest_last = apart.sort().values
    return float(largest_last[: max(len(apart) - few, 0)].square().sum() / max(len(apart), 1)) ** 0.5


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    """The part of the whole tensor that a piece should be. A piece with one dimension is a part of the flat tensor."""
    shape = piece.tensor.shape
    if len(shape) == 1 < whole.ndim:
        return whole.flatten()[piece.offset[0] : piece.offset[0] + shape[0]]
    return whole[tuple(slice(start, start + length) for start, length in zip(piece.offset, shape, strict=True))]
