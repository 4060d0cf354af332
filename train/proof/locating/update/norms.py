"""Norms that are wrong in known ways: sums of squares that count copies, or only a part."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from train.config.plan import Plan
from train.config.shapes import is_expert, shard
from train.proof.comparison import Named
from train.proof.locating.finding import Guess, Kind
from train.strategies.techniques import rank_of


def sums_of_squares(gradients: Named, plan: Plan) -> Iterator[tuple[Guess, float]]:
    """Sums that are not the square of the norm, and the mistakes that give them."""
    squares = {name: float(g.double().square().sum()) for name, g in gradients.items()}
    everything, rank = sum(squares.values()), rank_of(plan, 0)
    split = {name: rank.split_axes(name) for name in squares}
    for axis, n in plan.degrees.items():
        if n == 1:
            continue
        whole = sum(value for name, value in squares.items() if axis not in split[name])
        yield (
            Guess(Kind.counted_again, (axis,), f"what {axis} does not split counts {n} times"),
            everything + (n - 1) * whole,
        )
        yield Guess(Kind.part_missing, (axis,), f"what {axis} does not split does not count"), everything - whole
        own = sum(own_square(gradients[name].double(), name, axis, plan) for name in squares if axis in split[name])
        yield Guess(Kind.own_part, (axis,), f"what {axis} splits counts with rank 0's part alone"), whole + own
        yield Guess(Kind.counted_again, (axis,), f"every square counts {n} times"), everything * n
    for axis in (axis for axis, n in plan.degrees.items() if n > 1):
        yield from _without_a_group(gradients, squares, axis, plan)
    stages = plan.layers_of_stages
    for stage, layers in enumerate(stages if plan.degrees["pp"] > 1 else []):
        held = {"embed": stage == 0, "norm": stage == len(stages) - 1, "head": stage == len(stages) - 1}
        own = sum(v for n, v in squares.items() if held.get(n.split(".")[0], n.split(".")[1] in map(str, layers)))
        yield Guess(Kind.own_part, ("pp",), f"it is the norm of stage {stage} alone"), own
    if plan.config.model.tie_embeddings and plan.degrees["pp"] > 1:
        yield (
            Guess(Kind.counted_again, ("pp",), "the tied weight counts twice"),
            everything + squares["embed.weight"],
        )


def _without_a_group(
    gradients: Named, squares: dict[str, float], axis: str, plan: Plan
) -> Iterator[tuple[Guess, float]]:
    """Sums in which weights with one name, or wk and wv, do not count, or count with one rank's part."""
    leaves = {
        name: "experts" if is_expert(name) else name.removesuffix(".weight").rpartition(".")[2] for name in squares
    }
    for group in [{leaf} for leaf in dict.fromkeys(leaves.values())] + [{"wk", "wv"}]:
        names, said = [name for name, leaf in leaves.items() if leaf in group], " and ".join(sorted(group))
        left = sum(squares.values()) - sum(squares[name] for name in names)
        yield Guess(Kind.part_missing, (axis,), f"{said} does not count"), left
        own = sum(own_square(gradients[name].double(), name, axis, plan) for name in names)
        yield Guess(Kind.part_missing, (axis,), f"{said} counts with rank 0's part along {axis} alone"), left + own


def own_square(gradient: Tensor, name: str, axis: str, plan: Plan) -> float:
    """The square of rank 0's shard over the axis."""
    for technique in rank_of(plan, 0).techniques:
        part = None if technique.split is None else technique.split(rank_of(plan, 0), name)
        if part is not None and part.axis == axis:
            length = shard(tuple(gradient.shape), part.dim, part.degree, part.index)[part.dim]
            gradient = gradient.narrow(part.dim, 0, length)
    return float(gradient.square().sum())
