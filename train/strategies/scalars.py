"""Single numbers of a step: valid tokens (int64), the loss, the gradient's norm by who holds which part of it."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.plan import Plan
from train.config.shapes import element_sizes
from train.config.traffic import Traffic, degree_of, joined, loss_size


def scalars(plan: Plan) -> Iterator[Traffic]:
    loss = loss_size(plan)
    for axis in ("dp_replicate", "dp_shard"):
        if axis in plan.axes:
            yield Traffic(axis, "all_reduce", 2, 8 + loss, "scalars: valid tokens, loss")
    if "cp" in plan.axes:
        yield Traffic("cp", "all_reduce", 1, loss, "scalars: loss")
    yield from norm(plan)
    if "pp" in plan.axes:
        kept, _ = element_sizes(plan.config.precision)
        yield Traffic("pp", "all_reduce", 2, kept + loss, "scalars: gradient norm, loss")


def norm(plan: Plan) -> Iterator[Traffic]:
    """Weights that are split alike are summed together: under tp the norms are whole, and ep splits experts only. KV
    heads that ranks of tp share are split over fewer ranks than the rest."""
    kept, _ = element_sizes(plan.config.precision)
    apart, shared = plan.splits_experts, degree_of(plan, "kv_replicate") > 1
    if plan.config.strategy.uses_fsdp():
        classes = 1 + ("tp" in plan.axes) + shared
        yield Traffic(joined(plan, "dp_shard", "cp"), "all_reduce", classes, classes * kept, "scalars: gradient norm")
    if apart:
        for axis in ("efsdp", "ep"):
            yield Traffic(axis, "all_reduce", 1, kept, "scalars: experts' gradient norm")
    if "tp" in plan.axes:
        calls = 2 if apart else 1
        yield Traffic("tp", "all_reduce", calls, calls * kept, "scalars: gradient norm")
    if shared:
        yield Traffic("kv_shard", "all_reduce", 1, kept, "scalars: gradient norm of shared KV heads")
