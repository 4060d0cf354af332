"""What ranks hold after AdamW steps, against one device: moments, buffers and weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from train.proof.collecting import ADAMW_LR
from train.proof.locating.kinds import error_of
from train.ranks.state import Piece

# AdamW moves a weight by about the learning rate, whatever the size of its gradient. If rounding decides the sign of a
# very small gradient, the weight moves the other way. So weights are compared as a whole: by the root of the mean
# square of the error relative to the learning rate. LEAST_MOVE is never called wrong, nor FLIPS times what one device
# with moved inputs has. After later steps, moments have such moves in them: they may differ LATER times as much as
# after the first.
LEAST_MOVE, FLIPS, LATER = 0.02, 8.0, 1000.0
Whole = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class WrongPiece:
    """A piece that is wrong. `module`: "moments" (buffers too) or "weights"."""

    module: str
    name: str
    found: Tensor
    right: Tensor
    error: float
    scale: float
    ranks: tuple[int, ...]


def first_wrong(
    held: Sequence[Sequence[Sequence[Piece]]],
    right: Sequence[Sequence[Piece]],
    moved: Sequence[Sequence[Piece]],
    explained: Callable[[float], float],
    lossy: float,
) -> WrongPiece | None:
    """The worst piece of the first step in which one is wrong, moments before weights. `held`: [rank][step][piece], the
    others [step][piece]. `explained`: what rounding explains of an error if moved inputs lead to an error."""
    for step, of_one in enumerate(right):
        whole = {(one.name, one.kind): one.tensor for one in of_one}
        apart = {(one.name, one.kind): error_of_piece(one, whole) for one in moved[step]}
        found: dict[str, list[tuple[float, int, Piece, float]]] = {"moments": [], "weights": []}
        for rank, steps in enumerate(held):
            for piece in steps[step]:
                is_weight, by_moving = piece.kind == "parameter", apart.get((piece.name, piece.kind), 0.0)
                scale = (
                    max(LEAST_MOVE, FLIPS * by_moving)
                    if is_weight
                    else max(explained(by_moving) * (LATER if step else 1), lossy)
                )
                if (error := error_of_piece(piece, whole)) > scale:
                    found["weights" if is_weight else "moments"].append((error, rank, piece, scale))
        for module, wrong in found.items():
            if wrong:
                error, _, piece, scale = max(wrong, key=lambda one: one[0])
                ranks = tuple(sorted({rank for _, rank, *_ in wrong}))
                right_part = part_of(whole[piece.name, piece.kind], piece)
                name = piece.name if piece.kind == "parameter" else f"{piece.name} {piece.kind}"
                return WrongPiece(module, name, piece.tensor, right_part, error, scale, ranks)
    return None


def error_of_piece(piece: Piece, whole: Whole) -> float:
    """0 for a tensor that one device does not have, and for a flat part of a split weight's moment."""
    right = whole.get((piece.name, piece.kind))
    if right is None or len(piece.offset) > piece.tensor.ndim:
        return 0.0
    if piece.kind != "parameter":
        return error_of(piece.tensor, part_of(right, piece), right)
    apart = float((piece.tensor.double() - part_of(right, piece).double()).square().mean().sqrt()) / ADAMW_LR
    return apart if apart == apart else float("inf")


def part_of(whole: Tensor, piece: Piece) -> Tensor:
    """The part of the whole tensor that a piece should be. A piece with one dimension is a part of the flat tensor."""
    shape = piece.tensor.shape
    if len(shape) == 1 < whole.ndim:
        return whole.flatten()[piece.offset[0] : piece.offset[0] + shape[0]]
    return whole[tuple(slice(start, start + length) for start, length in zip(piece.offset, shape, strict=True))]
