"""Which axes of a mesh cross the machines of a run, and a warning where tensor parallelism does."""

from __future__ import annotations

import math

from train.command.validate import validate
from train.config.plan import Plan
from train.config.strategy import MESH_AXES

# Within one layer, forward and backward wait for the messages of these axes.
IN_EVERY_LAYER = ("tp",)


def crosses(plan: Plan, axis: str, per_node: int) -> bool:
    """Whether ranks that share a group of this axis are on different machines, which have `per_node` ranks each."""
    degree = plan.degrees[axis]
    inner = math.prod(plan.degrees[one] for one in MESH_AXES[MESH_AXES.index(axis) + 1 :])
    span = inner * (degree - 1)  # from the first rank of a group to its last
    block = inner * degree
    firsts = (start + i for start in range(0, plan.world_size, block) for i in range(inner))
    return any(first // per_node != (first + span) // per_node for first in firsts)


def across(plan: Plan, nodes: int) -> list[str]:
    """The axes that cross machines, from the outermost."""
    return [one for one in MESH_AXES if plan.degrees[one] > 1 and crosses(plan, one, plan.world_size // nodes)]


def crossing(plan: Plan, nodes: int) -> list[str]:
    """Lines for launch.explain: the axes inside a machine, and those that cross."""
    per_node, over = plan.world_size // nodes, across(plan, nodes)
    inside = [axis for axis in MESH_AXES if plan.degrees[axis] > 1 and axis not in over]
    lines = [f"{nodes:,} nodes of {per_node:,} process(es): node 0 has ranks 0-{per_node - 1}, and so on"]
    lines += [f"  inside a node  {listed(plan, inside)}", f"  across nodes   {listed(plan, over)}"]
    if plan.ep > 1:
        lines.append(f"  the all-to-all of experts (ep {plan.ep}) is over ranks of dp_shard and cp")
    return [*lines, *(f"  {line}" for line in warnings(plan, nodes))]


def warnings(plan: Plan, nodes: int) -> list[str]:
    """A line for each axis whose messages every layer waits for, and that crosses machines."""
    per_node = plan.world_size // nodes
    return [
        f"warning: strategy.{axis}={plan.degrees[axis]} crosses nodes of {per_node} process(es), so that every layer "
        f"waits for the network: {_smaller(plan, axis, per_node)}"
        for axis in IN_EVERY_LAYER
        if plan.degrees[axis] > 1 and crosses(plan, axis, per_node)
    ]


def _smaller(plan: Plan, axis: str, per_node: int) -> str:
    """The largest degree that stays inside a machine and is valid, as advice."""
    for degree in range(min(plan.degrees[axis] - 1, per_node), 1, -1):
        there = plan.override(f"strategy.{axis}={degree}")
        if not validate(there.config, there.world_size) and not crosses(there, axis, per_node):
            return f"use strategy.{axis}={degree}"
    other = "a strategy that puts another axis across nodes, such as fsdp_tp or tp_pp"
    return f"use {other}" if per_node > 1 else f"use more processes on each node, or a strategy without {axis}"


def listed(plan: Plan, axes: list[str]) -> str:
    return ", ".join(f"{axis} {plan.degrees[axis]}" for axis in axes) or "none"
