"""The time of a layer and of the head from a measured profile: each product, attention and elementwise work by its own
measured rate, and what the weights cost beside them.

For each microbatch a weight is cast to the precision of the products, its gradient is cast back, and it is added to
those of earlier microbatches. FSDP casts and adds shards only, but copies every gathered weight out of the message's
buffer, and every gradient into one.
"""

from __future__ import annotations

from collections.abc import Iterable

from train.command.planning import products
from train.command.planning.products import Direction, Matrix
from train.command.planning.profile import Profile
from train.command.planning.quantities import Quantities, is_gathered, shards_of
from train.config.schema import Precision
from train.config.shapes import element_sizes
from train.config.traffic import tokens_of

LARGER_BACKWARD = 2.5  # FLOPs of attention's backward over those of its forward: five products for two
SUM_BYTES = 12  # per float32 gradient that is added to an older one: two are read, one is written


def products_seconds(profile: Profile, matrices: Iterable[Matrix], rows: float) -> tuple[float, float]:
    """Forward and backward of `rows` tokens with matrices."""
    forward = backward = 0.0
    for columns, depth in matrices:
        calls = products.calls_of(columns, depth, rows)
        first, *others = (2 * r * n * k / profile.product_rate(r, n, k) for r, n, k in calls)
        forward, backward = forward + first, backward + sum(others)
    return forward, backward


def elements_of(matrices: Iterable[Matrix]) -> float:
    return sum(columns * depth for columns, depth in matrices)


def cast_bytes(matrices: Iterable[Matrix], precision: Precision) -> float:
    """Bytes read and written when weights, or their gradients, are cast to another precision; 0 if they are not."""
    kept, used = element_sizes(precision)
    return elements_of(matrices) * (kept + used) if kept != used else 0.0


def weight_bytes(q: Quantities, matrices: Iterable[Matrix]) -> tuple[float, float]:
    """Bytes read and written for weights in the forward and in the backward of a microbatch, beside the products."""
    plan = q.job.plan
    kept, used = element_sizes(plan.config.precision)
    elements, casts = elements_of(matrices), cast_bytes(matrices, plan.config.precision)
    if not is_gathered(plan):
        return casts, casts + elements * SUM_BYTES * (q.microbatches - 1) / q.microbatches
    shards, strategy = shards_of(plan), plan.config.strategy
    gather = casts / shards + 2 * used * elements
    gathers = gather if strategy.frees_parameters() else gather / q.microbatches
    if strategy.reduces_once():
        return gather / q.microbatches, elements * (SUM_BYTES + (used + kept) / q.microbatches)
    reduce = (used + kept + SUM_BYTES / shards) * elements
    return gathers, reduce + (gathers if strategy.frees_parameters() else 0.0)


def layer_time(q: Quantities, profile: Profile) -> tuple[Direction, Direction]:
    """Forward and backward of one layer of one microbatch, without messages and recomputation."""
    plan, work = q.job.plan, q.work
    model, matrices = plan.config.model, [*work.matrices]
    computed = products_seconds(profile, matrices, tokens_of(plan))
    flops = work.attention_flops, LARGER_BACKWARD * work.attention_flops
    rates = profile.attention_rates(work.heads, plan.config.train.seq_len, model.dim // model.num_heads)
    elementwise = profile.elementwise_rates("layer", work.bytes)
    weights = weight_bytes(q, matrices)
    forward, backward = (
        Direction(
            computed[i],
            flops[i] / rates[i],
            (1 + i) * work.bytes / elementwise[i],
            weights[i] / profile.bandwidth("copy", weights[i]) if weights[i] else 0.0,
        )
        for i in range(2)
    )
    return forward, backward


def head_time(q: Quantities, profile: Profile, direction: int) -> float:
    """Forward (0) or backward (1) of the head and the loss of one microbatch."""
    matrices, loss = [q.head_matrix], q.head[2]
    computed = products_seconds(profile, matrices, tokens_of(q.job.plan))[direction]
    weights = weight_bytes(q, matrices)[direction]
    copied = weights / profile.bandwidth("copy", weights) if weights else 0.0
    return computed + loss / profile.elementwise_rates("loss", loss)[direction] + copied
