"""What the closed forms of communication share: rows of traffic, their sums, the names of groups, and counts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from train.config.plan import Plan
from train.config.schema import Precision
from train.config.shapes import kv_shards, units

LAB = "lab"  # the axis under which the lab's own traffic is counted: metrics, barriers, checkpoints


@dataclass(frozen=True)
class Total:
    calls: int
    bytes: int

    def __add__(self, other: Total) -> Total:
        return Total(self.calls + other.calls, self.bytes + other.bytes)


@dataclass(frozen=True)
class Traffic:
    """The calls of one operation over one axis in an optimiser step. `bytes`: the sum over all `calls`. `mean`: `bytes`
    is the mean over the ranks of the axis, as the number that a single rank sends depends on the routers' choices."""

    axis: str
    op: str
    calls: int
    bytes: int
    reason: str
    mean: bool = False


def totals(rows: Iterable[Traffic]) -> dict[tuple[str, str], Total]:
    """The sums of the rows by (axis, op), which are the ledger's keys."""
    result: dict[tuple[str, str], Total] = {}
    for row in rows:
        key = (row.axis, row.op)
        result[key] = result.get(key, Total(0, 0)) + Total(row.calls, row.bytes)
    return result


def joined(plan: Plan, *axes: str) -> str:
    """The name of a group over several axes: those along which its ranks differ."""
    return ".".join(axis for axis in axes if plan.degrees[axis] > 1) or axes[0]


def degree_of(plan: Plan, axis: str) -> int:
    """The number of ranks of a group, given by the name of its axis or axes."""
    return math.prod(_degree(plan, part) for part in axis.split("."))


def _degree(plan: Plan, axis: str) -> int:
    if axis in plan.degrees:
        return plan.degrees[axis]
    if axis in ("ep", "efsdp"):
        return plan.ep if axis == "ep" else plan.degrees["dp_shard"] * plan.degrees["cp"] // plan.ep
    tp, shards = plan.degrees["tp"], kv_shards(plan.config.model, plan.degrees["tp"])
    return {"kv_shard": shards, "kv_replicate": tp // shards}.get(axis, 1)


def loss_size(plan: Plan) -> int:
    return 8 if plan.config.precision is Precision.float64 else 4


def tokens_of(plan: Plan) -> int:
    """Tokens of one microbatch on one rank of cp."""
    return plan.config.train.micro_batch_size * plan.config.train.seq_len // plan.degrees["cp"]


def num_layers(plan: Plan, place: dict[str, int]) -> int:
    """The number of layers of a rank."""
    return sum(name.startswith("layers.") for name, _ in units(plan, place["pp"]))
