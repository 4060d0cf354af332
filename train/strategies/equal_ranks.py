"""Groups of ranks that hold and send the same, so that thousands of ranks are computed from a few of them. No torch."""

from __future__ import annotations

from collections.abc import Hashable

from train.config.plan import Plan
from train.config.shapes import Shape, coordinates, stages_of, units
from train.config.technique import Rank
from train.strategies.techniques import used
from train.strategies.traffic import depends_on_schedule


def groups_of_equal_ranks(plan: Plan) -> dict[tuple[int, Hashable], list[int]]:
    """The ranks in groups that hold and send the same, by (index on `pp`, parts of a layer's and of both ends'
    parameters).

    The groups are in the order of their first ranks.
    """
    groups: dict[tuple[int, Hashable], list[int]] = {}
    shapes = _shapes(plan)
    parts: dict[tuple[int, ...], Hashable] = {}
    techniques = used(plan)
    for rank in range(plan.world_size):
        place = coordinates(plan, rank)
        axes = tuple(index for axis, index in place.items() if axis not in ("pp", "dp_replicate"))
        if axes not in parts:
            here = Rank(plan, place, techniques)
            parts[axes] = tuple(here.holds(name, shape) for name, shape in shapes)
        groups.setdefault((place["pp"], parts[axes]), []).append(rank)
    return groups


def sending_key(plan: Plan, rank: int) -> Hashable:
    """A key that is equal for ranks of `pp` that send the same: the numbers of their layers, and the ends that they
    have."""
    if depends_on_schedule(plan):
        return rank
    names = [name for name, _ in units(plan, rank) if not name.startswith("layers.")]
    stages = stages_of(plan, rank)
    onward = tuple((s + 1 in stages, s == plan.num_stages - 1, s == 0) for s in stages)
    return tuple(names), tuple(len(plan.layers_of_stages[s]) for s in stages), onward


def _shapes(plan: Plan) -> list[tuple[str, Shape]]:
    """One parameter of each kind: those of one layer, and those of both ends of the model."""
    last = plan.degrees["pp"] - 1
    found: dict[tuple[str, Shape], tuple[str, Shape]] = {}
    for rank in {0, last}:
        for _, unit in units(plan, rank):
            for name, shape in unit.items():
                found.setdefault((name.split(".", 2)[-1], shape), (name, shape))
    return [*found.values()]
