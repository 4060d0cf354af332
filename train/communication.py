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
from train.shapes import (
    Shape,
    chunk,
    coordinates,
    element_sizes,
    fsdp_place,
    powersgd_elements,
    shard,
    stages_of,
    tp_shard,
    units,
)
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
    techniques = (tensor, context, fsdp, ddp, pipeline)
    rows = [*(row for technique in techniques for row in technique(plan, place)), *scalars(plan)]
    return [row for row in rows if degree_of(plan, row.axis) > 1 and row.calls]


def joined(plan: Plan, *axes: str) -> str:
    """The name of a group over several axes: those along which its ranks differ."""
    return ".".join(axis for axis in axes if plan.degrees[axis] > 1) or axes[0]


def degree_of(plan: Plan, axis: str) -> int:
    return math.prod(plan.degrees.get(part, 1) for part in axis.split("."))


def unknown(plan: Plan) -> str | None:
    """What of this plan has no closed form yet: then `expected` must not be asked."""
    splits = isinstance(plan.config.strategy, Pipeline) and plan.config.strategy.splits_backward()
    without = {
        f"strategy={plan.config.strategy.name}": not plan.config.strategy.closed_form,
        "recomputation under a split backward": splits
        and plan.config.train.activation_checkpointing is not ActivationCheckpointing.none,
        "FSDP under many stages a rank": "dp_shard" in plan.axes and plan.num_stages > 3 * plan.degrees["pp"],
        "DDP under several stages a rank": "dp_replicate" in plan.axes and plan.num_stages > plan.degrees["pp"],
        "mixtures of experts": plan.config.model.num_experts > 0,
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
    tokens = config.train.micro_batch_size * config.train.seq_len // plan.degrees["cp"]
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
        if not plan.config.strategy.uses_fsdp():  # type: ignore[attr-defined]
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


def context(plan: Plan, place: Place) -> Iterator[Traffic]:
    """Context parallelism: keys and values, or heads, of every layer's attention. kv: this rank's K and V."""
    if "cp" not in plan.axes:
        return
    model, m, cp, (kept, used) = (
        plan.config.model,
        plan.num_microbatches,
        plan.degrees["cp"],
        element_sizes(plan.config.precision),
    )
    tokens = plan.config.train.micro_batch_size * plan.config.train.seq_len // cp
    head_dim, tp = model.dim // model.num_heads, plan.degrees["tp"]
    kv, q = (tokens * heads // tp * head_dim for heads in (2 * model.num_kv_heads, model.num_heads))
    n = m * sum(name.startswith("layers.") for name, _ in units(plan, place["pp"]))
    again = plan.config.train.activation_checkpointing is not ActivationCheckpointing.none
    forwards = 2 * n if again else n
    if plan.option("cp_method", "") == "allgather":
        yield Traffic("cp", "all_gather", forwards, forwards * cp * kv * used, "each layer: K and V")
        yield Traffic("cp", "reduce_scatter", n, n * cp * kv * used, "each layer: their gradients")
    elif plan.option("cp_method", "") == "ring":
        calls, size = forwards * (cp - 1), forwards * (cp - 1) * kv * used
        yield Traffic("cp", "all_to_all", calls, size, "each layer: K and V round the ring")
        size = n * ((cp - 1) * kv * used + cp * kv * kept)
        yield Traffic("cp", "all_to_all", n * (cp + 1), size, "each layer: K, V and their gradients, backward")
    else:
        exchanges = 2 * (forwards + n)
        size = (forwards + n) * (2 * q + kv) * used
        yield Traffic("cp", "all_to_all", exchanges, size, "each layer: tokens to heads and back")


def fsdp(plan: Plan, place: Place) -> Iterator[Traffic]:
    """FSDP2: parameters gathered for the forward, and again for the backward where they were freed; gradients
    reduce-scattered, their shards all-reduced over `dp_replicate` (HSDP)."""
    if not plan.config.strategy.uses_fsdp():  # type: ignore[attr-defined]
        return
    kept, used = element_sizes(plan.config.precision)
    axis, m = joined(plan, "dp_shard", "cp"), plan.num_microbatches
    degree = degree_of(plan, axis)
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
        yield Traffic(axis, "all_gather", gathers, gathers * padded * gathered, f"{name}: {why}")
        reduced = 4 if plan.config.precision is Precision.bf16 else kept
        yield Traffic(axis, "reduce_scatter", sums, sums * padded * reduced, f"{name}: gradients")
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
    """DDP: every gradient once a step, in buckets; with a communication hook as 16 bits, or as PowerSGD's factors."""
    if not plan.config.strategy.uses_ddp():  # type: ignore[attr-defined]
        return
    axis, (kept, _) = joined(plan, "dp_replicate", "cp"), element_sizes(plan.config.precision)
    shapes = [shape for _, unit in units(plan, place["pp"]) for shape in unit.values()][::-1]
    cap = plan.option("bucket_mb", 25.0) * 2**20
    buckets: list[list[Shape]] = [[]]
    for shape in shapes:  # in the backward's order; a bucket is closed by the one that fills it
        buckets[-1].append(shape)
        if kept * sum(map(math.prod, buckets[-1])) >= cap:
            buckets.append([])
    buckets = [bucket for bucket in buckets if bucket]
    hook = plan.option("comm_hook", "none")
    if hook == "powersgd":
        for bucket in buckets:
            sizes = [(math.prod(shape), powersgd_elements(shape, plan.option("powersgd_rank", 4))) for shape in bucket]
            calls = any(sent == size for size, sent in sizes) + 2 * any(sent < size for size, sent in sizes)
            size = kept * sum(sent for _, sent in sizes)
            yield Traffic(axis, "all_reduce", calls, size, "vectors, and two factors a matrix, once it compresses")
    else:
        size = (kept if hook == "none" else 2) * sum(map(math.prod, shapes))
        yield Traffic(axis, "all_reduce", len(buckets), size, "gradients, in buckets")


def pipeline(plan: Plan, place: Place) -> Iterator[Traffic]:
    """Activations to the next stage, their gradients to the one before."""
    if "pp" not in plan.axes:
        return
    config, strategy, m = plan.config, plan.config.strategy, plan.num_microbatches
    assert isinstance(strategy, Pipeline)
    _, used = element_sizes(config.precision)
    shards = plan.degrees["tp"] if "tp" in plan.axes and plan.option("sequence_parallel", True) else 1
    shards *= plan.degrees["cp"]
    hidden = config.train.micro_batch_size * (config.train.seq_len // shards) * config.model.dim * used
    own = stages_of(plan, place["pp"])
    onward = sum(s + 1 < plan.num_stages and s + 1 not in own for s in own)  # a V's turn stays on its rank
    back = sum(s > 0 and s - 1 not in own for s in own)
    yield Traffic("pp", "send", onward * m, onward * m * hidden, "activations to the next stage")
    yield Traffic("pp", "send", back * m, back * m * hidden, "their gradients to the stage before")
    if config.model.tie_embeddings and (0 in own) != (plan.num_stages - 1 in own):
        kept, _ = element_sizes(config.precision)
        name, table = "embed.weight", (config.model.vocab_size, config.model.dim)
        held = shard(tp_shard(plan, place, name, table), 0, *fsdp_place(plan, place))
        yield Traffic("pp", "send", 1, math.prod(held) * kept, "the tied embedding's gradient")


def scalars(plan: Plan) -> Iterator[Traffic]:
    """The number of valid tokens (int64), the gradient norm, the loss: one element each."""
    kept, _ = element_sizes(plan.config.precision)
    loss = loss_size(plan)
    for axis in ("dp_replicate", "dp_shard"):
        if axis in plan.axes:
            yield Traffic(axis, "all_reduce", 2, 8 + loss, "scalars: valid tokens, loss")
    if "cp" in plan.axes:
        yield Traffic("cp", "all_reduce", 1, loss, "scalars: loss")
    if plan.config.strategy.uses_fsdp():  # type: ignore[attr-defined]
        # under tp the norms are whole, so their squares are summed apart
        classes = 2 if "tp" in plan.axes else 1
        yield Traffic(joined(plan, "dp_shard", "cp"), "all_reduce", classes, classes * kept, "scalars: gradient norm")
    if "tp" in plan.axes:
        yield Traffic("tp", "all_reduce", 1, kept, "scalars: gradient norm")
    if "pp" in plan.axes:
        yield Traffic("pp", "all_reduce", 2, kept + loss, "scalars: gradient norm, loss")


def loss_size(plan: Plan) -> int:
    return 8 if plan.config.precision is Precision.float64 else 4
