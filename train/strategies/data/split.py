"""Which part of each parameter a rank holds with FSDP2."""

from __future__ import annotations

import math

from train.config.shapes import Shape, folded_place, is_expert
from train.config.technique import Rank, Split
from train.config.traffic import joined

# the dimension of the width D in the experts' weights, [E, F, D] and [E, D, F]; neither `ep` nor `tp` splits it
EXPERT_WIDTH_DIM = {"gate": 2, "up": 2, "down": 1}


def split(rank: Rank, name: str) -> Split:
    """A chunk of the rows, over the ranks of dp_shard x cp. Under `ep`, experts are split by their width instead, over
    the ranks that share the same experts."""
    degree, index = folded_place(rank.plan, rank.place)
    if is_expert(name) and rank.plan.splits_experts:
        ep = rank.plan.ep
        return Split(EXPERT_WIDTH_DIM[name.split(".")[-1]], degree // ep, index // ep, "efsdp")
    return Split(0, degree, index, joined(rank.plan, "dp_shard", "cp"))


def padded(rank: Rank, name: str, shape: Shape) -> int:
    """The number of elements of the rank's part of a parameter, where FSDP pads the dimension to equal shards."""
    part, own = rank.computes(name, shape), split(rank, name)
    return math.prod(part) // part[own.dim] * math.ceil(part[own.dim] / own.degree) * own.degree


def powersgd_elements(shape: Shape, rank: int) -> int:
    """How many elements PowerSGD sends for a gradient: those of two factors, or the whole gradient if it has fewer."""
    rows, size = shape[0], math.prod(shape)
    columns = size // rows
    return min(size, (rows + columns) * min(rank, rows, columns)) if len(shape) > 1 else size
