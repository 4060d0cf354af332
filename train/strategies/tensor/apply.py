"""Tensor parallelism (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022), over the axis `tp`.

                 norm    | gather  wq wk wv  attention  wo  scatter |   the feed-forward is like attention
    activations  B T/t D | B T D   heads/t              B T D       B T/t D

Activations between these regions are split over the tokens: whole sequences of the microbatch (B/t T D) where there is
an equal number for each rank, else parts of each sequence, as drawn. wq, wk, wv, gate and up are split by output
features (columns), wo and down by input features (rows), the embedding and the head by the vocabulary. Norms are whole
on every rank. With fewer KV heads than ranks, t / K neighbouring ranks hold the same KV head for different query heads,
and its gradient is the sum of their gradients.

Sent per layer and microbatch: 4 all-gathers and 4 reduce-scatters of B x T x D elements with sequence parallelism, half
of them in the backward; 4 all-reduces without it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.nn import functional as F

from train.config.schema import ModelConfig
from train.config.shapes import chunk, kv_shards, token_dim
from train.config.technique import Target
from train.model.transformer import FeedForward
from train.ranks import collectives
from train.strategies.tensor.keys import TensorKeys
from train.strategies.tensor.layers import (
    ColumnParallelLinear,
    ReplicatedRMSNorm,
    RowParallelLinear,
    SequenceParallelRMSNorm,
    SharedHeadLinear,
    VocabParallelCrossEntropy,
    VocabParallelEmbedding,
    shard_weight,
)
from train.strategies.tensor.mixture import boundaries, split_mixture
from train.strategies.tensor.split import SPLIT_DIM

KV_AXES = ("kv_shard", "kv_replicate")


def _gather_logits(module: nn.Module, args: Any, logits: Tensor, *, vocab_size: int, group: ProcessGroup) -> Tensor:
    width = len(chunk(vocab_size, group.size(), 0))  # shards must be equal: the last ones are padded, then cut off
    logits = F.pad(logits, (0, width - logits.shape[-1]))
    return collectives.all_gather_replicated(logits, logits.ndim - 1, group)[..., :vocab_size]


def pipeline_products(group: ProcessGroup) -> None:
    """Async TP (Wang et al. 2023; torch's `_micro_pipeline_tp`): inductor fuses an all-gather with the matrix products
    of its result, and a product with its reduce-scatter, into operators that work in pieces: one piece is sent while
    the next is multiplied. The pieces are sent through symmetric memory, which ranks in one NVLink domain have.

    It is private (torch 2.11 to 2.13), and needs NCCL (`TensorKeys.needed_backend`).
    """
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():  # torch warns that the call is not needed, but inductor still needs it
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True


def head_mesh(mesh: DeviceMesh, model: ModelConfig) -> DeviceMesh | None:
    """The 1-D `mesh` (`tp`) as a 2-D mesh: KV heads x the ranks that share one. Rank i has query heads of KV head
    i // (t / K). None if every rank has KV heads of its own; otherwise it makes groups, which is collective over the
    world.

    The method is private (tried with torch 2.13); no public one splits an axis.
    """
    shards = kv_shards(model, mesh.size())
    if shards == mesh.size():
        return None
    # The axes get new groups, also if torch would use the world's group, so that the groups have names.
    own: dict[str, Any] = dict.fromkeys(KV_AXES, dist.get_backend(mesh.get_group()))
    return mesh._unflatten(0, (shards, mesh.size() // shards), KV_AXES, own)


def placement(module: str) -> Placement:
    """The placement of the weight of a module with this name."""
    return Shard(SPLIT_DIM[module])


def apply_tp(target: Target) -> None:
    """Split a model on meta over `tp`, in place, except the weights of experts, which `expert/apply.py` splits. Nothing
    is sent. It is collective if `head_mesh` makes groups."""
    keys, model, mesh = target.keys(TensorKeys), target.model, target.mesh["tp"]
    dim = token_dim(target.config.train.micro_batch_size, mesh.size()) if keys.sequence_parallel else None
    group, vocab_size = mesh.get_group(), model.config.vocab_size
    if keys.async_tp:
        pipeline_products(group)
    if "heads" not in target.meshes:  # all stages share one mesh, so that one message completes all their gradients
        target.meshes["heads"] = head_mesh(mesh, target.config.model)
    heads = target.meshes["heads"]
    if dim is not None:
        target.mask_axes.add("tp")
    first_row = chunk(vocab_size, mesh.size(), mesh.get_local_rank()).start
    join, leave = boundaries(group, dim)
    norm_class = ReplicatedRMSNorm if dim is None else SequenceParallelRMSNorm

    def entry(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (join(args[0]), *args[1:])

    def split(module: Any, to: type[nn.Module], placement: Placement) -> None:
        module.__class__ = to  # it remains the same module, with its parameter names and hooks, but another forward
        shard_weight(module, mesh, placement)

    def split_heads(module: Any, name: str) -> None:
        if heads is None:
            split(module, ColumnParallelLinear, placement(name))
        else:
            module.__class__ = SharedHeadLinear
            shard_weight(module, heads, placement(name), Replicate())

    def split_rows(module: Any, name: str) -> None:
        split(module, RowParallelLinear, placement(name))
        module.leave = leave

    layers: Iterable[Any] = model.layers.values()
    for layer in layers:
        for norm in (layer.attention_norm, layer.feed_forward_norm):
            split(norm, norm_class, Replicate())
        attention, feed_forward = layer.attention, layer.feed_forward
        split(attention.wq, ColumnParallelLinear, placement("wq"))
        split_heads(attention.wk, "wk")
        split_heads(attention.wv, "wv")
        split_rows(attention.wo, "wo")
        attention.register_forward_pre_hook(entry)
        if isinstance(feed_forward, FeedForward):
            split(feed_forward.gate, ColumnParallelLinear, placement("gate"))
            split(feed_forward.up, ColumnParallelLinear, placement("up"))
            split_rows(feed_forward.down, "down")
            feed_forward.register_forward_pre_hook(entry)
        else:
            split_mixture(feed_forward, mesh, dim)
    if (embed := cast(Any, model.embed)) is not None:
        split(embed, VocabParallelEmbedding, placement("embed"))
        embed.leave, embed.first_row = leave, first_row
    if model.norm is not None:
        split(model.norm, norm_class, Replicate())
    if model.head is not None:
        split(model.head, ColumnParallelLinear, placement("head"))
        model.head.register_forward_pre_hook(entry)
        if keys.loss_parallel:
            model.loss = VocabParallelCrossEntropy(first_row, group)
        else:
            model.head.register_forward_hook(partial(_gather_logits, vocab_size=vocab_size, group=group))
    model.tie()
