"""What every closed form is made of: rows of traffic, their sums, the names of groups, counts that techniques share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing, Precision
from train.config.shapes import block, kv_shards, units
from train.strategies.pipeline.strategy import Pipeline
from train.strategies.pipeline.timetable import actions_by_rank

Place = dict[str, int]  # a rank's coordinates on every axis
MAX_WHOLE = 3  # stages of a rank that torch's schedules keep gathered
LAB = "lab"  # the axis of the lab's own traffic: metrics, barriers, checkpoints


@dataclass(frozen=True)
class Total:
    calls: int
    bytes: int

    def __add__(self, other: Total) -> Total:
        return Total(self.calls + other.calls, self.bytes + other.bytes)


@dataclass(frozen=True)
class Traffic:
    """`bytes`: of all `calls` together. `mean`: over the axis' ranks, of which each sends as much as routers chose."""

    axis: str
    op: str
    calls: int
    bytes: int
    reason: str
    mean: bool = False


def totals(rows: Iterable[Traffic]) -> dict[tuple[str, str], Total]:
    """By (axis, op), as the ledger gives them."""
    result: dict[tuple[str, str], Total] = {}
    for row in rows:
        key = (row.axis, row.op)
        result[key] = result.get(key, Total(0, 0)) + Total(row.calls, row.bytes)
    return result


def joined(plan: Plan, *axes: str) -> str:
    """The name of a group over several axes: those along which its ranks differ."""
    return ".".join(axis for axis in axes if plan.degrees[axis] > 1) or axes[0]


def degree_of(plan: Plan, axis: str) -> int:
    """Ranks of a group, by the name of its axis or axes."""
    tp, shards = plan.degrees["tp"], kv_shards(plan.config.model, plan.degrees["tp"])
    folded = {"ep": plan.ep, "efsdp": plan.degrees["dp_shard"] * plan.degrees["cp"] // plan.ep}
    folded |= {"kv_shard": shards, "kv_replicate": tp // shards}
    return math.prod(folded.get(part) or plan.degrees.get(part, 1) for part in axis.split("."))


def loss_size(plan: Plan) -> int:
    return 8 if plan.config.precision is Precision.float64 else 4


def tokens_of(plan: Plan) -> int:
    """Tokens of one microbatch on one rank of cp."""
    return plan.config.train.micro_batch_size * plan.config.train.seq_len // plan.degrees["cp"]


def num_layers(plan: Plan, place: Place) -> int:
    return sum(name.startswith("layers.") for name, _ in units(plan, place["pp"]))


def num_actions(plan: Plan) -> int:
    """Forwards and backwards of a step, over all ranks of `pp`."""
    return 2 * plan.num_microbatches * plan.num_stages


def depends_on_schedule(plan: Plan) -> bool:
    """Whether what a rank sends follows from the order of its forwards and backwards, not from their numbers alone."""
    strategy = plan.config.strategy
    if not isinstance(strategy, Pipeline):
        return False
    recomputes = plan.config.train.activation_checkpointing is not ActivationCheckpointing.none
    gathers_again = strategy.uses_fsdp() and plan.num_stages > MAX_WHOLE * plan.degrees["pp"]
    return gathers_again or (recomputes and strategy.splits_backward())


def recomputations(plan: Plan, place: Place) -> int:
    """How many times a layer's forward runs again in a step, over the layers of a rank.

    Once a microbatch under whole backwards. A split one runs it again for the gradients of inputs and, as torch asks
    for them one by one, for the gradient of every parameter; but the first stage, which has no inputs to tell, as a
    whole one.
    """
    strategy, ranks = plan.config.strategy, plan.degrees["pp"]
    if plan.config.train.activation_checkpointing is ActivationCheckpointing.none:
        return 0
    if not (isinstance(strategy, Pipeline) and strategy.splits_backward()):
        return plan.num_microbatches * num_layers(plan, place)
    layers = plan.layers_of_stages
    actions = actions_by_rank(strategy.schedule, plan.num_stages, ranks, plan.num_microbatches)[place["pp"]]
    split = 1 + len(block(plan.config.model))
    times = {"B": 1, "W": split}
    return sum(
        len(layers[stage]) * (min(times.get(kind, 0), 1) if stage == 0 else times.get(kind, 0))
        for kind, stage, _ in actions
    )
