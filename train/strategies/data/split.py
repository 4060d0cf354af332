"""Who holds what under FSDP2."""

from __future__ import annotations

import math

from train.config.shapes import Shape, folded_place, is_expert
from train.config.technique import Rank, Split

# of the weights of all experts, [E, F, D] and [E, D, F]: the width D, which neither `ep` nor `tp` splits
EXPERT_WIDTH_DIM = {"gate": 2, "up": 2, "down": 1}


def split(rank: Rank, name: str) -> Split:
    """Rows, over the ranks of dp_shard x cp; of experts their width, over the ranks that `ep` leaves."""
    degree, index = folded_place(rank.plan, rank.place)
    if is_expert(name) and rank.plan.splits_experts:
        ep = rank.plan.ep
        return Split(EXPERT_WIDTH_DIM[name.split(".")[-1]], degree // ep, index // ep)
    return Split(0, degree, index)


def padded(rank: Rank, name: str, shape: Shape) -> int:
    """Elements of the rank's part of a parameter, with the dimension that FSDP splits padded to whole shards."""
    part, own = rank.computes(name, shape), split(rank, name)
    return math.prod(part) // part[own.dim] * math.ceil(part[own.dim] / own.degree) * own.degree


def powersgd_elements(shape: Shape, rank: int) -> int:
    """How many elements PowerSGD sends of a gradient: two factors if they are fewer than it has, else all of it."""
    rows, size = shape[0], math.prod(shape)
    columns = size // rows
    return min(size, (rows + columns) * min(rank, rows, columns)) if len(shape) > 1 else size
