"""The traffic of tensor parallelism: activations at the split layers, the loss, and the gradients of whole weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from train.config.plan import Plan
from train.config.shapes import Shape, chunk, element_sizes, units
from train.config.technique import Rank
from train.config.traffic import Traffic, degree_of, loss_size, num_layers, tokens_of
from train.strategies.recompute.traffic import recomputations
from train.strategies.tensor.keys import TensorKeys
from train.strategies.tensor.split import KV_MODULES


def traffic(rank: Rank) -> Iterator[Traffic]:
    yield from activations(rank)
    yield from whole_weights(rank)
    yield from shared_heads(rank)
    if has_end(rank, "head"):
        yield loss(rank.plan)


def has_end(rank: Rank, end: str) -> bool:
    return any(end in name for name, _ in units(rank.plan, rank.place["pp"]))


def activations(rank: Rank) -> Iterator[Traffic]:
    """Messages of BTD elements: four per layer, half of them in the backward, and one or two for the embedding and for
    the head."""
    plan = rank.plan
    m, (kept, used) = plan.num_microbatches, element_sizes(plan.config.precision)
    size = tokens_of(plan) * plan.config.model.dim
    n = m * num_layers(plan, rank.place)
    embed, head = (m * has_end(rank, end) for end in ("embed", "head"))
    # Recomputation repeats both entries and the first exit. It stops before the result of the last product is sent,
    # unless dropout comes after it, whose mask the backward needs.
    again = recomputations(rank)
    exits = again * (2 if plan.config.model.dropout > 0 else 1)
    if plan.config.strategy.shards_sequence():
        for op in ("all_gather", "reduce_scatter"):
            yield Traffic("tp", op, 4 * n, 4 * n * size * used, "each layer: 4 of BTD")
            yield Traffic("tp", op, embed, embed * size * kept, "embedding")
            yield Traffic("tp", op, head, head * size * used, "the head's input")
        yield Traffic("tp", "all_gather", 2 * again, 2 * again * size * used, "recomputed")
        yield Traffic("tp", "reduce_scatter", exits, exits * size * used, "recomputed")
    else:
        yield Traffic("tp", "all_reduce", 4 * n, 4 * n * size * used, "each layer: 4 of BTD")
        yield Traffic("tp", "all_reduce", embed, embed * size * kept, "embedding")
        yield Traffic("tp", "all_reduce", head, head * size * used, "the head's input, backward")
        yield Traffic("tp", "all_reduce", exits, exits * size * used, "recomputed")


def whole_weights(rank: Rank) -> Iterator[Traffic]:
    """Gradients of whole weights that are one term of a sum: routers', and with sequence parallelism norms'."""
    plan = rank.plan
    ends = ("router.weight", "norm.weight") if plan.config.strategy.shards_sequence() else ("router.weight",)
    whole = {
        name: shape for _, unit in units(plan, rank.place["pp"]) for name, shape in unit.items() if name.endswith(ends)
    }
    yield completed(plan, "tp", [*whole.values()], "whole weights")


def shared_heads(rank: Rank) -> Iterator[Traffic]:
    """Gradients of KV heads that several ranks hold; each rank has the term of its own query heads."""
    plan = rank.plan
    if degree_of(plan, "kv_replicate") == 1:
        return
    parameters = [item for _, unit in units(plan, rank.place["pp"]) for item in unit.items()]
    shapes = [rank.computes(name, shape) for name, shape in parameters if name.split(".")[-2] in KV_MODULES]
    yield completed(plan, "kv_replicate", shapes, "shared KV heads")


def completed(plan: Plan, axis: str, shapes: list[Shape], what: str) -> Traffic:
    """The all-reduces that complete gradients of these shapes: one per step for all of them. FSDP completes each
    gradient before its reduce-scatter: after every backward, or once after the last if it sums all microbatches first.
    """
    kept, used = element_sizes(plan.config.precision)
    size, m = sum(map(math.prod, shapes)), plan.num_microbatches
    if not plan.config.strategy.uses_fsdp():
        return Traffic(axis, "all_reduce", min(len(shapes), 1), kept * size, f"gradients of {what}, once a step")
    once = plan.config.strategy.reduces_once()
    times, element = (1 if once else m), (kept if "pp" in plan.axes or (once and m > 1) else used)
    calls = len(shapes) * times
    return Traffic(axis, "all_reduce", calls, times * element * size, f"FSDP completes gradients of {what}")


def loss(plan: Plan) -> Traffic:
    """The maxima, sums and target logits of every token; or all logits, whose shards are padded to equal size."""
    m, tokens = plan.num_microbatches, tokens_of(plan)
    if plan.keys(TensorKeys).loss_parallel:
        calls, size = 2 * m * plan.config.train.loss_chunks, 3 * m * tokens * loss_size(plan)
        return Traffic("tp", "all_reduce", calls, size, "the loss: maxima, sums, targets")
    _, used = element_sizes(plan.config.precision)
    degree = plan.degrees["tp"]
    logits = tokens * degree * len(chunk(plan.config.model.vocab_size, degree, 0))
    return Traffic("tp", "all_gather", m, m * logits * used, "logits, gathered")
