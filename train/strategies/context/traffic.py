"""Context parallelism: keys and values, or heads, of every layer's attention."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.plan import Plan
from train.config.shapes import element_sizes, kv_shards
from train.config.traffic import Place, Traffic, num_layers, recomputations, tokens_of


def context(plan: Plan, place: Place) -> Iterator[Traffic]:
    """`kv`: elements of this rank's keys and values, `q` of its queries."""
    if "cp" not in plan.axes:
        return
    model, cp, (kept, used) = plan.config.model, plan.degrees["cp"], element_sizes(plan.config.precision)
    tokens, head_dim, tp = tokens_of(plan), model.dim // model.num_heads, plan.degrees["tp"]
    kv_heads = model.num_kv_heads // kv_shards(model, tp)
    kv, q = (tokens * heads * head_dim for heads in (2 * kv_heads, model.num_heads // tp))
    n = plan.num_microbatches * num_layers(plan, place)
    forwards = n + recomputations(plan, place)
    if plan.option("cp_method", "") == "allgather":
        yield Traffic("cp", "all_gather", forwards, forwards * cp * kv * used, "each layer: K and V")
        yield Traffic("cp", "reduce_scatter", n, n * cp * kv * used, "each layer: their gradients")
    elif plan.option("cp_method", "") == "ring":
        calls, size = forwards * (cp - 1), forwards * (cp - 1) * kv * used
        yield Traffic("cp", "all_to_all", calls, size, "each layer: K and V round the ring")
        size = n * ((cp - 1) * kv * used + cp * kv * kept)
        yield Traffic("cp", "all_to_all", n * (cp + 1), size, "each layer: K, V and their gradients, backward")
    else:
        calls, size = 2 * (forwards + n), (forwards + n) * (2 * q + kv) * used
        yield Traffic("cp", "all_to_all", calls, size, "each layer: tokens to heads and back")
