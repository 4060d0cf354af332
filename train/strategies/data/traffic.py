"""The traffic of data parallelism: parameters are gathered, and gradients summed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

from train.config.plan import Plan
from train.config.shapes import Shape, Shapes, element_sizes, is_expert, units_by_stage
from train.config.technique import Rank
from train.config.traffic import Traffic, degree_of, joined
from train.strategies.data.keys import DdpKeys, FsdpKeys
from train.strategies.data.split import padded, powersgd_elements
from train.strategies.pipeline.timetable import Action, actions_by_rank

MAX_WHOLE = 3  # the most stages of a rank that torch's schedules keep gathered


def fsdp(rank: Rank) -> Iterator[Traffic]:
    """FSDP2: parameters are gathered for the forward, and again for the backward if they were freed. Gradients are
    reduce-scattered, and their shards all-reduced over `dp_replicate` (HSDP)."""
    plan = rank.plan
    axis = joined(plan, "dp_shard", "cp")
    for stage, name, unit in units_by_stage(plan, rank.place["pp"], copies=True):
        freed = frees(plan, name)
        gathers = num_gathers(rank, stage, freed=freed)
        dense = {key: shape for key, shape in unit.items() if not (plan.splits_experts and is_expert(key))}
        yield from fsdp_unit(rank, name, dense, axis, gathers, freed=freed)
        if own := {key: shape for key, shape in unit.items() if key not in dense}:
            yield from fsdp_unit(rank, f"{name}.experts", own, "efsdp", gathers, freed=freed)


def frees(plan: Plan, name: str) -> bool:
    """Whether a unit's gathered parameters are freed between its forward and its backward. Those of the head are not,
    because the backward begins there and would gather them again at once."""
    return plan.config.strategy.frees_parameters() and "head" not in name


def fsdp_unit(rank: Rank, name: str, shapes: Shapes, axis: str, gathers: int, *, freed: bool) -> Iterator[Traffic]:
    plan = rank.plan
    kept, used = element_sizes(plan.config.precision)
    elements = sum(padded(rank, key, shape) for key, shape in shapes.items())
    gathered = kept if name.startswith("embed") else used
    sums = 1 if plan.config.strategy.reduces_once() else plan.num_microbatches
    why = "forward and backward" if freed else "forward"
    yield Traffic(axis, "all_gather", gathers, gathers * elements * gathered, f"{name}: {why}")
    reduced = 4 if plan.config.precision.casts else kept
    yield Traffic(axis, "reduce_scatter", sums, sums * elements * reduced, f"{name}: gradients")
    if "dp_replicate" in plan.axes:
        part = elements // degree_of(plan, axis)
        yield Traffic("dp_replicate", "all_reduce", sums, sums * part * reduced, f"{name}: gradients' shards")


def num_gathers(rank: Rank, stage: int, *, freed: bool) -> int:
    plan, m, ranks = rank.plan, rank.plan.num_microbatches, rank.plan.degrees["pp"]
    if gathers_by_schedule(plan):
        schedule = plan.config.strategy.schedule_name() or ""
        return gathers_of_stage(schedule, plan.num_stages, ranks, m, rank.place["pp"], stage, freed)
    if "pp" in plan.axes or plan.keys(FsdpKeys).zero_stage < 3:
        return m + 1 if freed else 1  # a backward does not free the parameters, but the next forward does
    return 2 * m if freed else m


def gathers_by_schedule(plan: Plan) -> bool:
    """Whether a rank of a pipeline has more stages than torch's schedules keep gathered."""
    return plan.config.strategy.uses_fsdp() and plan.num_stages > MAX_WHOLE * plan.degrees["pp"]


@cache
def gathers_of_stage(
    schedule: str, num_stages: int, num_ranks: int, num_microbatches: int, rank: int, stage: int, freed: bool
) -> int:
    """How often torch's schedules gather a stage. They keep only the next MAX_WHOLE stages gathered."""
    actions = actions_by_rank(schedule, num_stages, num_ranks, num_microbatches)[rank]
    gathers, is_next, unsharded = 0, False, False
    for i, action in enumerate(actions):
        was_next, is_next = is_next, stage in next_stages(actions, i)
        unsharded = unsharded and is_next
        needed = (is_next and not was_next) or action.stage == stage
        gathers += needed and not unsharded
        unsharded = unsharded or needed
        if action.stage == stage and action.kind == "F" and freed:
            unsharded = False
    return gathers


def next_stages(actions: list[Action], start: int) -> list[int]:
    found: list[int] = []
    for i in range(start, len(actions)):
        if actions[i].stage not in found:
            found.append(actions[i].stage)
        if len(found) == MAX_WHOLE:
            break
    return found


def ddp(rank: Rank) -> Iterator[Traffic]:
    """DDP: every gradient once per step, in buckets. A communication hook sends 16 bits per element, or PowerSGD's
    factors."""
    plan, keys = rank.plan, rank.plan.keys(DdpKeys)
    axis, (kept, _) = joined(plan, "dp_replicate", "cp"), element_sizes(plan.config.precision)
    shapes: dict[int, list[Shape]] = {}
    for stage, _, unit in units_by_stage(plan, rank.place["pp"], copies=True):
        shapes.setdefault(stage, []).extend(unit.values())
    cap = keys.bucket_mb * 2**20
    filled = [bucket for of_stage in shapes.values() for bucket in buckets(of_stage[::-1], kept, cap)]
    hook = keys.comm_hook
    if hook == "powersgd":
        for bucket in filled:
            sizes = [(math.prod(shape), powersgd_elements(shape, keys.powersgd_rank)) for shape in bucket]
            calls = any(sent == size for size, sent in sizes) + 2 * any(sent < size for size, sent in sizes)
            size = kept * sum(sent for _, sent in sizes)
            yield Traffic(axis, "all_reduce", calls, size, "vectors and two factors per matrix, when compressed")
    else:
        size = (kept if hook == "none" else 2) * sum(math.prod(shape) for bucket in filled for shape in bucket)
        yield Traffic(axis, "all_reduce", len(filled), size, "gradients, in buckets")


def buckets(shapes: list[Shape], element_size: int, cap: float) -> list[list[Shape]]:
    """The gradients by bucket, in the order of the backward. The gradient that fills a bucket is its last."""
    found: list[list[Shape]] = [[]]
    filled = 0
    for shape in shapes:
        found[-1].append(shape)
        filled += element_size * math.prod(shape)
        if filled >= cap:
            found.append([])
            filled = 0
    return [bucket for bucket in found if bucket]
