"""The traffic of context parallelism: keys and values, or heads, of every layer's attention."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.shapes import element_sizes, kv_shards
from train.config.technique import Rank
from train.config.traffic import Traffic, num_layers, tokens_of
from train.strategies.context.keys import ContextKeys
from train.strategies.recompute.traffic import recomputations


def traffic(rank: Rank) -> Iterator[Traffic]:
    """`kv` is the number of elements of this rank's keys and values, and `q` that of its queries."""
    plan = rank.plan
    method = plan.keys(ContextKeys).cp_method
    model, cp, (kept, used) = plan.config.model, plan.degrees["cp"], element_sizes(plan.config.precision)
    tokens, head_dim, tp = tokens_of(plan), model.dim // model.num_heads, plan.degrees["tp"]
    kv_heads = model.num_kv_heads // kv_shards(model, tp)
    kv, q = (tokens * heads * head_dim for heads in (2 * kv_heads, model.num_heads // tp))
    n = plan.num_microbatches * num_layers(plan, rank.place)
    forwards = n + recomputations(rank)
    if method == "allgather":
        yield Traffic("cp", "all_gather", forwards, forwards * cp * kv * used, "each layer: K and V")
        yield Traffic("cp", "reduce_scatter", n, n * cp * kv * used, "each layer: their gradients")
    elif method == "ring":
        calls, size = forwards * (cp - 1), forwards * (cp - 1) * kv * used
        yield Traffic("cp", "all_to_all", calls, size, "each layer: K and V round the ring")
        size = n * ((cp - 1) * kv * used + cp * kv * kept)
        yield Traffic("cp", "all_to_all", n * (cp + 1), size, "each layer: K, V and their gradients, backward")
    else:
        calls, size = 2 * (forwards + n), (forwards + n) * (2 * q + kv) * used
        yield Traffic("cp", "all_to_all", calls, size, "each layer: tokens to heads and back")
