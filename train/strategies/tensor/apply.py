"""Tensor parallelism (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022), over the axis `tp`.

                 norm    | gather  wq wk wv  attention  wo  scatter |   + the same round the feed-forward
    activations  B T/t D | B T D   heads/t              B T D       B T/t D

Split: wq, wk, wv, gate, up by output (columns), wo, down by input (rows), embedding and head by vocabulary. Norms are
whole on each rank. With fewer KV heads than ranks, t / K neighbouring ranks hold the same KV head, for different query
heads: the head's gradient is the sum of theirs. Sent per layer and microbatch: with sequence parallelism 4 all-gathers
and 4 reduce-scatters of B x T x D elements (half of each in the backward, as the other's adjoint); without, 4
all-reduces.
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
from train.config.shapes import chunk, kv_shards
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
    width = len(chunk(vocab_size, group.size(), 0))  # gathered shards are equal: the last ones are padded, and cut
    logits = F.pad(logits, (0, width - logits.shape[-1]))
    return collectives.all_gather_replicated(logits, logits.ndim - 1, group)[..., :vocab_size]


def pipeline_products(group: ProcessGroup) -> None:
    """Async TP (Wang et al. 2023; torch's `_micro_pipeline_tp`): inductor writes a gather and the products of its
    result, or a product and its reduce-scatter, as one operator that works in pieces, so that sending one hides behind
    multiplying another. Its pieces travel by symmetric memory, which ranks of one NVLink domain have.

    Private (torch 2.11 to 2.13), and of NCCL alone (`TensorKeys.needed_backend`).
    """
    import torch._inductor.config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():  # said to be needless, but inductor still asks for what it registers
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(group.group_name)
    torch._inductor.config._micro_pipeline_tp = True


def head_mesh(mesh: DeviceMesh, model: ModelConfig) -> DeviceMesh | None:
    """The ranks of the 1-D `mesh` (`tp`) as KV heads x the ranks that share one: rank i has query heads of KV head
    i // (t / K). None where every rank has KV heads of its own. Collective over the world otherwise: it makes groups.

    By a private method (seen with torch 2.13), as no public one splits an axis.
    """
    shards = kv_shards(model, mesh.size())
    if shards == mesh.size():
        return None
    # groups of their own, also where torch would take the world's: they have a name
    own: dict[str, Any] = dict.fromkeys(KV_AXES, dist.get_backend(mesh.get_group()))
    return mesh._unflatten(0, (shards, mesh.size() // shards), KV_AXES, own)


def placement(module: str) -> Placement:
    """How the weight of a module with this name is split."""
    return Shard(SPLIT_DIM[module])


def apply_tp(target: Target) -> None:
    """Split a model on meta over `tp`, in place; of a mixture of experts all but the experts' weights, which
    `expert/apply.py` splits. Sends nothing; collective where `head_mesh` is."""
    keys, model, mesh = target.keys(TensorKeys), target.model, target.mesh["tp"]
    sequence_parallel = keys.sequence_parallel
    group, vocab_size = mesh.get_group(), model.config.vocab_size
    if keys.async_tp:
        pipeline_products(group)
    if "heads" not in target.meshes:  # one for all stages, so that one message completes all their gradients
        target.meshes["heads"] = head_mesh(mesh, target.config.model)
    heads = target.meshes["heads"]
    if sequence_parallel:
        target.mask_axes.add("tp")
    first_row = chunk(vocab_size, mesh.size(), mesh.get_local_rank()).start
    join, leave = boundaries(group, sequence_parallel=sequence_parallel)
    norm_class = SequenceParallelRMSNorm if sequence_parallel else ReplicatedRMSNorm

    def entry(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (join(args[0]), *args[1:])

    def split(module: Any, to: type[nn.Module], placement: Placement) -> None:
        module.__class__ = to  # the same module with another forward: parameter names and hooks stay
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
            split_mixture(feed_forward, mesh, sequence_parallel=sequence_parallel)
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
