"""What a strategy must send, in closed form: calls and bytes by axis and operation, per optimiser step and rank.

Torch is not imported. Bytes follow nccl-tests' convention, as the ledger's do; forward, backward and update together.
Sources are in docs/communication.md. One function per technique; B, T, D, V as in `model.py`, m microbatches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from train.config import ActivationCheckpointing, Precision
from train.plan import Plan
from train.shapes import chunk, coordinates, element_sizes, stages_of, tp_shard, units
from train.strategies.pipeline import Pipeline

Place = dict[str, int]  # a rank's coordinates on every axis
LAB = "lab"  # the axis of the lab's own traffic: metrics, barriers, checkpoints


@dataclass(frozen=True)
class Total:
    calls: int
    bytes: int

    def __add__(self, other: Total) -> Total:
        return Total(self.calls + other.calls, self.bytes + other.bytes)


@dataclass(frozen=True)
class Traffic:
    """`bytes`: of all `calls` together."""

    axis: str
    op: str
    calls: int
    bytes: int
    reason: str


def expected(plan: Plan, rank: int = 0) -> list[Traffic]:
    """Everything that this rank sends in one optimiser step. Axes of degree 1 send nothing."""
    place = coordinates(plan, rank)
    techniques = (tensor(plan, place), fsdp(plan, place), ddp(plan, place), pipeline(plan, place), scalars(plan))
    rows = (row for technique in techniques for row in technique)
    return [row for row in rows if plan.degrees.get(row.axis, 1) > 1 and row.calls]


def unknown(plan: Plan) -> str | None:
    """What of this plan has no closed form yet: then `expected` must not be asked."""
    splits = isinstance(plan.config.strategy, Pipeline) and plan.config.strategy.facts().splits_backward
    without = {
        f"strategy={plan.config.strategy.name}": not plan.config.strategy.closed_form,
        "context parallelism": "cp" in plan.axes,
        "tied embeddings over stages": plan.config.model.tie_embeddings and plan.num_stages > 1,
        "recomputation under a split backward": splits
        and plan.config.train.activation_checkpointing is not ActivationCheckpointing.none,
        "FSDP under many stages a rank": "dp_shard" in plan.axes and plan.num_stages > 3 * plan.degrees["pp"],
        "DDP under several stages a rank": "dp_replicate" in plan.axes and plan.num_stages > plan.degrees["pp"],
        "mixtures of experts": plan.config.model.num_experts > 0,
        "ZeRO stages 1 and 2": "dp_shard" in plan.axes and "pp" not in plan.axes and plan.option("zero_stage", 3) < 3,
        "communication hooks": plan.option("comm_hook", "none") != "none",
    }
    return ", ".join(name for name, found in without.items() if found) or None


def totals(rows: Iterable[Traffic]) -> dict[tuple[str, str], Total]:
    """By (axis, op), as the ledger gives them."""
    result: dict[tuple[str, str], Total] = {}
    for row in rows:
        key = (row.axis, row.op)
        result[key] = result.get(key, Total(0, 0)) + Total(row.calls, row.bytes)
    return result


def tensor(plan: Plan, place: Place) -> Iterator[Traffic]:
    """Tensor parallelism: what enters and leaves the split layers, the loss, and the norms' gradients."""
    if "tp" not in plan.axes:
        return
    config, m = plan.config, plan.num_microbatches
    kept, used = element_sizes(config.precision)
    tokens = config.train.micro_batch_size * config.train.seq_len
    activation = tokens * config.model.dim
    names = [name for name, _ in units(plan, place["pp"])]
    layers = sum(name.startswith("layers.") for name in names)
    embed, head = (any(end in name for name in names) for end in ("embed", "head"))
    # what recomputation runs again: both entries and the first exit; it stops before the last product's result leaves
    again = config.train.activation_checkpointing is not ActivationCheckpointing.none
    if plan.option("sequence_parallel", True):
        for op in ("all_gather", "reduce_scatter"):
            yield Traffic("tp", op, 4 * layers * m, 4 * layers * m * activation * used, "each layer: 4 of BTD")
            yield Traffic("tp", op, embed * m, embed * m * activation * kept, "embedding")
            yield Traffic("tp", op, head * m, head * m * activation * used, "the head's input")
        if again:
            yield Traffic("tp", "all_gather", 2 * layers * m, 2 * layers * m * activation * used, "recomputed")
            yield Traffic("tp", "reduce_scatter", layers * m, layers * m * activation * used, "recomputed")
        norms, norm_bytes = 2 * layers + head, (2 * layers + head) * config.model.dim * kept
        if "dp_shard" not in plan.axes:
            yield Traffic("tp", "all_reduce", 1, norm_bytes, "the norms' gradients, once a step")
        else:
            times = m if plan.degrees["pp"] == 1 and "pp" not in plan.axes else 1
            yield Traffic("tp", "all_reduce", norms * times, norm_bytes * times, "FSDP completes each norm's gradient")
    else:
        yield Traffic("tp", "all_reduce", 4 * layers * m, 4 * layers * m * activation * used, "each layer: 4 of BTD")
        yield Traffic("tp", "all_reduce", embed * m, embed * m * activation * kept, "embedding")
        yield Traffic("tp", "all_reduce", head * m, head * m * activation * used, "the head's input, backward")
        if again:
            yield Traffic("tp", "all_reduce", layers * m, layers * m * activation * used, "recomputed")
    if head and plan.option("loss_parallel", True):
        scalar = loss_size(plan)
        yield Traffic("tp", "all_reduce", 2 * m, 3 * m * tokens * scalar, "the loss: maxima, sums, targets")
    elif head:
        degree = plan.degrees["tp"]
        logits = tokens * degree * len(chunk(config.model.vocab_size, degree, 0))  # shards are padded to the largest
        yield Traffic("tp", "all_gather", m, m * logits * used, "logits, gathered")


def fsdp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """FSDP2: parameters gathered for the forward, and again for the backward where they were freed; gradients
    reduce-scattered, their shards all-reduced over `dp_replicate` (HSDP)."""
    if "dp_shard" not in plan.axes:
        return
    kept, used = element_sizes(plan.config.precision)
    m, degree = plan.num_microbatches, plan.degrees["dp_shard"]
    stage_of_zero = plan.option("zero_stage", 3)
    piped = "pp" in plan.axes  # a schedule tells FSDP which backward is the last, as ZeRO-1 does
    reshard = plan.config.strategy.frees_parameters()  # type: ignore[attr-defined]
    for name, shapes in units(plan, place["pp"]):
        padded = sum(_padded(tp_shard(plan, place, key, shape), degree) for key, shape in shapes.items())
        gathered = kept if name.startswith("embed") else used
        freed = reshard and "head" not in name  # the backward begins there: freed, it would be gathered at once
        gathers = _gathers(m, freed=freed, once=piped or stage_of_zero < 3)
        sums = 1 if piped or stage_of_zero == 1 else m
        why = "forward and backward" if freed else "forward"
        yield Traffic("dp_shard", "all_gather", gathers, gathers * padded * gathered, f"{name}: {why}")
        reduced = 4 if plan.config.precision is Precision.bf16 else kept
        yield Traffic("dp_shard", "reduce_scatter", sums, sums * padded * reduced, f"{name}: gradients")
        if "dp_replicate" in plan.axes:
            shard = padded // degree
            yield Traffic("dp_replicate", "all_reduce", sums, sums * shard * reduced, f"{name}: gradients' shards")


def _gathers(m: int, *, freed: bool, once: bool) -> int:
    if once:  # a backward keeps what it gathered, and the forward after it frees it: one more than forwards
        return m + 1 if freed else 1
    return 2 * m if freed else m


def _padded(shape: tuple[int, ...], degree: int) -> int:
    """Elements with dimension 0 padded to a multiple of the degree."""
    return math.ceil(shape[0] / degree) * degree * math.prod(shape[1:])


def ddp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """DDP: every gradient once a step, in buckets."""
    if "dp_replicate" not in plan.axes or "dp_shard" in plan.axes:
        return
    kept, _ = element_sizes(plan.config.precision)
    sizes = [kept * math.prod(shape) for _, unit in units(plan, place["pp"]) for shape in unit.values()][::-1]
    cap = plan.option("bucket_mb", 25.0) * 2**20
    buckets, filled = 0, 0.0
    for size in sizes:  # in the backward's order; a bucket is closed by the one that fills it
        buckets, filled = (buckets, filled + size) if filled + size < cap else (buckets + 1, 0.0)
    yield Traffic("dp_replicate", "all_reduce", buckets + (filled > 0), sum(sizes), "gradients, in buckets")


def pipeline(plan: Plan, place: Place) -> Iterator[Traffic]:
    """Activations to the next stage, their gradients to the one before."""
    if "pp" not in plan.axes:
        return
    config, strategy, m = plan.config, plan.config.strategy, plan.num_microbatches
    assert isinstance(strategy, Pipeline)
    _, used = element_sizes(config.precision)
    shards = plan.degrees["tp"] if "tp" in plan.axes and plan.option("sequence_parallel", True) else 1
    hidden = config.train.micro_batch_size * (config.train.seq_len // shards) * config.model.dim * used
    own = stages_of(plan, place["pp"])
    onward = sum(s + 1 < plan.num_stages and s + 1 not in own for s in own)  # a V's turn stays on its rank
    back = sum(s > 0 and s - 1 not in own for s in own)
    yield Traffic("pp", "send", onward * m, onward * m * hidden, "activations to the next stage")
    yield Traffic("pp", "send", back * m, back * m * hidden, "their gradients to the stage before")


def scalars(plan: Plan) -> Iterator[Traffic]:
    """The number of valid tokens (int64), the gradient norm, the loss: one element each."""
    kept, _ = element_sizes(plan.config.precision)
    loss = loss_size(plan)
    for axis in ("dp_replicate", "dp_shard"):
        if axis in plan.axes:
            yield Traffic(axis, "all_reduce", 2, 8 + loss, "scalars: valid tokens, loss")
    if "dp_shard" in plan.axes:
        # under tp the norms are whole, so their squares are summed apart
        classes = 2 if "tp" in plan.axes else 1
        yield Traffic("dp_shard", "all_reduce", classes, classes * kept, "scalars: gradient norm")
    if "tp" in plan.axes:
        yield Traffic("tp", "all_reduce", 1, kept, "scalars: gradient norm")
    if "pp" in plan.axes:
        yield Traffic("pp", "all_reduce", 2, kept + loss, "scalars: gradient norm, loss")


def loss_size(plan: Plan) -> int:
    return 8 if plan.config.precision is Precision.float64 else 4
