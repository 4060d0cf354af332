"""The traffic of mixtures of experts: tokens to experts and back (`ep`), and the routers' sums over ranks."""

from __future__ import annotations

from collections.abc import Iterator

from train.config.shapes import element_sizes
from train.config.technique import Rank
from train.config.traffic import Traffic, loss_size, num_layers, tokens_of
from train.strategies.recompute.traffic import recomputations

COUNT = 8  # bytes of a count of rows (int64), and of a router's sums over a step (float64)


def traffic(rank: Rank) -> Iterator[Traffic]:
    """Each token is sent as exactly K rows. This rank returns as many rows as the routers of all ranks sent to it, and
    as many gradients; the mean over the ranks of `ep` is known exactly, because all rows that leave also return."""
    plan, model = rank.plan, rank.plan.config.model
    if model.num_experts == 0:
        return
    n = plan.num_microbatches * num_layers(plan, rank.place)
    forwards = n + recomputations(rank)
    if plan.splits_experts:
        _, used = element_sizes(plan.config.precision)
        rows = model.top_k * tokens_of(plan) * model.dim * used
        size = forwards * model.num_experts * COUNT
        yield Traffic("ep", "all_to_all", forwards, size, "each layer: how many rows for each expert")
        calls = forwards + n
        yield Traffic("ep", "all_to_all", calls, calls * rows, "each layer: K of ND to experts, and their gradients")
        yield Traffic("ep", "all_to_all", calls, calls * rows, "each layer: results, and tokens' gradients", mean=True)
    chosen = plan.config.train.micro_batch_size * model.num_experts * loss_size(plan)
    yield Traffic("cp", "all_reduce", forwards, forwards * chosen, "each layer: experts' loads of whole sequences")
    numbers = model.num_layers * (model.num_experts + 2) * COUNT
    for axis in ("pp", "dp_replicate", "dp_shard", "cp"):
        yield Traffic(axis, "all_reduce", 1, numbers, "experts' loads, balance and entropy of the step")
