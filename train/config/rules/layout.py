"""Rules of the mesh: its degrees, the number of processes, and axes that cannot be combined."""

from __future__ import annotations

import math

from train.config.plan import Plan
from train.config.rule import Finding, Rule


def world_size(plan: Plan) -> Finding | None:
    product, world = math.prod(plan.degrees.values()), plan.world_size
    if product == world or not plan.axes:
        return None
    free = next((axis for axis, degree in plan.axes.items() if degree == -1), None)
    fixed = product // plan.degrees[free] if free else product
    shown = " x ".join(f"{axis} {plan.degrees[axis]}" for axis in plan.axes)
    message = f"{shown} needs {product} processes, but there are {world}"
    if free and world > fixed:
        message = f"strategy.{free}=-1 takes the ranks that are left, but {fixed} does not divide {world} processes"
    fixes = [f"nproc={fixed * max(world // fixed, 1)}" if free else f"nproc={product}"]
    if not free:
        fixes += [f"strategy.{axis}=-1" for axis in plan.axes]
    return Finding(message, tuple(fixes), f"use a number of processes that {fixed} divides")


def single_device(plan: Plan) -> Finding | None:
    if plan.axes or plan.world_size == 1:
        return None
    message = f"strategy={plan.config.strategy.name} runs on 1 process, but there are {plan.world_size}"
    return Finding(message, ("nproc=1", "strategy.dp_replicate=-1"), "use one process, or the preset dp")


def ddp_over_tp(plan: Plan) -> Finding | None:
    axes = plan.axes
    if not ("dp_replicate" in axes and "tp" in axes and "dp_shard" not in axes):
        return None
    degree = axes["dp_replicate"]
    return Finding(
        f"strategy.dp_replicate={degree} (DDP) is not supported with strategy.tp={axes['tp']}",
        (f"strategy.dp_replicate=null strategy.dp_shard={degree}",),
        "use FSDP instead of DDP with tp, as the preset fsdp_tp does",
    )


RULES = (
    Rule("world_size", "with a mesh smaller than the world, ranks would be idle without notice", world_size),
    Rule("single_device", "training on a single device needs exactly one process", single_device),
    Rule("ddp_over_tp", "DDP broadcasts and buckets plain tensors, but the weights under tp are DTensors", ddp_over_tp),
)
