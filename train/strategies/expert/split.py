"""Who holds what under expert parallelism."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.shapes import folded_place, is_expert
from train.config.technique import Rank, Split

EXPERT_DIM = 0  # of the weights of all experts, [E, F, D] and [E, D, F]


def split(rank: Rank, name: str) -> Split | None:
    """Whole experts, over neighbours of the ranks that FSDP shards over."""
    if not is_expert(name):
        return None
    return Split(EXPERT_DIM, rank.plan.ep, group_of(rank.plan, rank.place))


def group_of(plan: Plan, place: dict[str, int]) -> int:
    """Which of the groups of experts the rank at `place` holds."""
    return folded_place(plan, place)[1] % plan.ep
