"""Data parallelism: parameters gathered and gradients summed."""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.communication.base import Place, Traffic, degree_of, joined
from train.config import Precision
from train.plan import Plan
from train.shapes import Shape, Shapes, element_sizes, fsdp_split, is_expert, model_shard, powersgd_elements, units


def fsdp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """FSDP2: parameters gathered for the forward, and again for the backward where they were freed; gradients
    reduce-scattered, their shards all-reduced over `dp_replicate` (HSDP)."""
    if not plan.config.strategy.uses_fsdp():  # type: ignore[attr-defined]
        return
    axis = joined(plan, "dp_shard", "cp")
    for name, unit in units(plan, place["pp"]):
        dense = {key: shape for key, shape in unit.items() if not (plan.splits_experts and is_expert(key))}
        yield from fsdp_unit(plan, place, name, dense, axis)
        if own := {key: shape for key, shape in unit.items() if key not in dense}:
            yield from fsdp_unit(plan, place, f"{name}.experts", own, "efsdp")


def fsdp_unit(plan: Plan, place: Place, name: str, shapes: Shapes, axis: str) -> Iterator[Traffic]:
    kept, used = element_sizes(plan.config.precision)
    m, stage_of_zero = plan.num_microbatches, plan.option("zero_stage", 3)
    piped = "pp" in plan.axes  # a schedule tells FSDP which backward is the last, as ZeRO-1 does
    reshard = plan.config.strategy.frees_parameters()  # type: ignore[attr-defined]
    padded = sum(_padded(plan, place, key, shape) for key, shape in shapes.items())
    gathered = kept if name.startswith("embed") else used
    freed = reshard and "head" not in name  # the backward begins there: freed, it would be gathered at once
    gathers = _gathers(m, freed=freed, once=piped or stage_of_zero < 3)
    sums = 1 if piped or stage_of_zero == 1 else m
    why = "forward and backward" if freed else "forward"
    yield Traffic(axis, "all_gather", gathers, gathers * padded * gathered, f"{name}: {why}")
    reduced = 4 if plan.config.precision is Precision.bf16 else kept
    yield Traffic(axis, "reduce_scatter", sums, sums * padded * reduced, f"{name}: gradients")
    if "dp_replicate" in plan.axes:
        part = padded // degree_of(plan, axis)
        yield Traffic("dp_replicate", "all_reduce", sums, sums * part * reduced, f"{name}: gradients' shards")


def _gathers(m: int, *, freed: bool, once: bool) -> int:
    if once:  # a backward keeps what it gathered, and the forward after it frees it: one more than forwards
        return m + 1 if freed else 1
    return 2 * m if freed else m


def _padded(plan: Plan, place: Place, name: str, shape: Shape) -> int:
    """Elements of a rank's part of a parameter, with the dimension that FSDP splits padded to whole shards."""
    part, (dim, degree, _) = model_shard(plan, place, name, shape), fsdp_split(plan, place, name)
    return math.prod(part) // part[dim] * math.ceil(part[dim] / degree) * degree


def ddp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """DDP: every gradient once a step, in buckets; with a communication hook as 16 bits, or as PowerSGD's factors."""
    if not plan.config.strategy.uses_ddp():  # type: ignore[attr-defined]
        return
    axis, (kept, _) = joined(plan, "dp_replicate", "cp"), element_sizes(plan.config.precision)
    shapes = [shape for _, unit in units(plan, place["pp"]) for shape in unit.values()][::-1]
    filled = buckets(shapes, kept, plan.option("bucket_mb", 25.0) * 2**20)
    hook = plan.option("comm_hook", "none")
    if hook == "powersgd":
        for bucket in filled:
            sizes = [(math.prod(shape), powersgd_elements(shape, plan.option("powersgd_rank", 4))) for shape in bucket]
            calls = any(sent == size for size, sent in sizes) + 2 * any(sent < size for size, sent in sizes)
            size = kept * sum(sent for _, sent in sizes)
            yield Traffic(axis, "all_reduce", calls, size, "vectors, and two factors a matrix, once it compresses")
    else:
        size = (kept if hook == "none" else 2) * sum(map(math.prod, shapes))
        yield Traffic(axis, "all_reduce", len(filled), size, "gradients, in buckets")


def buckets(shapes: list[Shape], element_size: int, cap: float) -> list[list[Shape]]:
    """In the backward's order; a bucket is closed by the gradient that fills it."""
    found: list[list[Shape]] = [[]]
    for shape in shapes:
        found[-1].append(shape)
        if element_size * sum(map(math.prod, found[-1])) >= cap:
            found.append([])
    return [bucket for bucket in found if bucket]
