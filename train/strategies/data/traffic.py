"""Data parallelism: parameters gathered and gradients summed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from train.config.plan import Plan
from train.config.schema import Precision
from train.config.shapes import (
    Shape,
    Shapes,
    element_sizes,
    fsdp_split,
    is_expert,
    model_shard,
    powersgd_elements,
    units_by_stage,
)
from train.config.traffic import MAX_WHOLE, Place, Traffic, degree_of, joined
from train.strategies.pipeline.strategy import Pipeline
from train.strategies.pipeline.timetable import Action, actions_by_rank


def fsdp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """FSDP2: parameters gathered for the forward, and again for the backward where they were freed; gradients
    reduce-scattered, their shards all-reduced over `dp_replicate` (HSDP)."""
    if not plan.config.strategy.uses_fsdp():  # type: ignore[attr-defined]
        return
    axis = joined(plan, "dp_shard", "cp")
    for stage, name, unit in units_by_stage(plan, place["pp"], copies=True):
        freed = frees(plan, name)
        gathers = num_gathers(plan, place, stage, freed=freed)
        dense = {key: shape for key, shape in unit.items() if not (plan.splits_experts and is_expert(key))}
        yield from fsdp_unit(plan, place, name, dense, axis, gathers, freed=freed)
        if own := {key: shape for key, shape in unit.items() if key not in dense}:
            yield from fsdp_unit(plan, place, f"{name}.experts", own, "efsdp", gathers, freed=freed)


def frees(plan: Plan, name: str) -> bool:
    """Whether a unit's gathered parameters are freed between its forward and its backward: not the head's, as the
    backward begins there and would gather them at once."""
    return plan.config.strategy.frees_parameters() and "head" not in name  # type: ignore[attr-defined]


def fsdp_unit(
    plan: Plan, place: Place, name: str, shapes: Shapes, axis: str, gathers: int, *, freed: bool
) -> Iterator[Traffic]:
    kept, used = element_sizes(plan.config.precision)
    padded = sum(_padded(plan, place, key, shape) for key, shape in shapes.items())
    gathered = kept if name.startswith("embed") else used
    # a schedule tells FSDP which backward is the last, as ZeRO-1 does
    sums = 1 if "pp" in plan.axes or plan.option("zero_stage", 3) == 1 else plan.num_microbatches
    why = "forward and backward" if freed else "forward"
    yield Traffic(axis, "all_gather", gathers, gathers * padded * gathered, f"{name}: {why}")
    reduced = 4 if plan.config.precision is Precision.bf16 else kept
    yield Traffic(axis, "reduce_scatter", sums, sums * padded * reduced, f"{name}: gradients")
    if "dp_replicate" in plan.axes:
        part = padded // degree_of(plan, axis)
        yield Traffic("dp_replicate", "all_reduce", sums, sums * part * reduced, f"{name}: gradients' shards")


def num_gathers(plan: Plan, place: Place, stage: int, *, freed: bool) -> int:
    m, ranks = plan.num_microbatches, plan.degrees["pp"]
    strategy = plan.config.strategy
    if isinstance(strategy, Pipeline) and plan.num_stages > MAX_WHOLE * ranks:
        return gathers_of_stage(strategy.schedule, plan.num_stages, ranks, m, place["pp"], stage, freed)
    if "pp" in plan.axes or plan.option("zero_stage", 3) < 3:
        return m + 1 if freed else 1  # a backward keeps what it gathered, and the forward after it frees it
    return 2 * m if freed else m


@cache
def gathers_of_stage(
    schedule: str, num_stages: int, num_ranks: int, num_microbatches: int, rank: int, stage: int, freed: bool
) -> int:
    """How often torch's schedules gather a stage: they hold those that come next, MAX_WHOLE of them, and no others."""
    actions = actions_by_rank(schedule, num_stages, num_ranks, num_microbatches)[rank]
    gathers, held, whole = 0, False, False
    for i, action in enumerate(actions):
        was, held = held, stage in next_stages(actions, i)
        whole = whole and held
        needed = (held and not was) or action.stage == stage
        gathers += needed and not whole
        whole = whole or needed
        if action.stage == stage and action.kind == "F" and freed:
            whole = False
    return gathers


def next_stages(actions: list[Action], start: int) -> list[int]:
    found: list[int] = []
    for i in range(start, len(actions)):
        if actions[i].stage not in found:
            found.append(actions[i].stage)
        if len(found) == MAX_WHOLE:
            break
    return found


def _padded(plan: Plan, place: Place, name: str, shape: Shape) -> int:
    """Elements of a rank's part of a parameter, with the dimension that FSDP splits padded to whole shards."""
    part, (dim, degree, _) = model_shard(plan, place, name, shape), fsdp_split(plan, place, name)
    return math.prod(part) // part[dim] * math.ceil(part[dim] / degree) * degree


def ddp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """DDP: every gradient once a step, in buckets; with a communication hook as 16 bits, or as PowerSGD's factors."""
    if not plan.config.strategy.uses_ddp():  # type: ignore[attr-defined]
        return
    axis, (kept, _) = joined(plan, "dp_replicate", "cp"), element_sizes(plan.config.precision)
    shapes: dict[int, list[Shape]] = {}
    for stage, _, unit in units_by_stage(plan, place["pp"], copies=True):
        shapes.setdefault(stage, []).extend(unit.values())
    cap = plan.option("bucket_mb", 25.0) * 2**20
    filled = [bucket for of_stage in shapes.values() for bucket in buckets(of_stage[::-1], kept, cap)]
    hook = plan.option("comm_hook", "none")
    if hook == "powersgd":
        for bucket in filled:
            sizes = [(math.prod(shape), powersgd_elements(shape, plan.option("powersgd_rank", 4))) for shape in bucket]
            calls = any(sent == size for size, sent in sizes) + 2 * any(sent < size for size, sent in sizes)
            size = kept * sum(sent for _, sent in sizes)
            yield Traffic(axis, "all_reduce", calls, size, "vectors, and two factors a matrix, once it compresses")
    else:
        size = (kept if hook == "none" else 2) * sum(math.prod(shape) for bucket in filled for shape in bucket)
        yield Traffic(axis, "all_reduce", len(filled), size, "gradients, in buckets")


def buckets(shapes: list[Shape], element_size: int, cap: float) -> list[list[Shape]]:
    """In the backward's order; a bucket is closed by the gradient that fills it."""
    found: list[list[Shape]] = [[]]
    filled = 0
    for shape in shapes:
        found[-1].append(shape)
        filled += element_size * math.prod(shape)
        if filled >= cap:
            found.append([])
            filled = 0
    return [bucket for bucket in found if bucket]
