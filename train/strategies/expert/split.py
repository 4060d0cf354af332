"""Which experts a rank holds with expert parallelism."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.shapes import folded_place, is_expert
from train.config.technique import Rank, Split

EXPERT_DIM = 0  # the dimension of the experts in their weights, [E, F, D] and [E, D, F]


def split(rank: Rank, name: str) -> Split | None:
    """The rank's experts, which are whole. The ranks of `ep` are neighbours among the ranks that FSDP shards over."""
    if not (is_expert(name) and rank.plan.splits_experts):
        return None
    return Split(EXPERT_DIM, rank.plan.ep, group_of(rank.plan, rank.place), "ep")


def group_of(plan: Plan, place: dict[str, int]) -> int:
    """The number of the group of experts that the rank at `place` holds."""
    return folded_place(plan, place)[1] % plan.ep
