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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from train.config.schema import ModelConfig
from train.config.shapes import chunk, kv_shards
from train.model.transformer import IGNORE_INDEX, Embedding, FeedForward, Linear, RMSNorm, Transformer, upcast
from train.ranks import collectives
from train.ranks.gradients import local

SEQUENCE_DIM = 1
KV_AXES = ("kv_shard", "kv_replicate")


def shard_weight(module: Any, mesh: DeviceMesh, *placements: Placement) -> None:
    """Declare the module's weight (on meta) as a DTensor over the tp mesh."""
    weight = distribute_tensor(module.weight.detach(), mesh, placements, src_data_rank=None)
    module.weight = nn.Parameter(weight)


class ColumnParallelLinear(Linear):
    """Output features split: this rank's weight is [out/t, in]; the input is whole on every rank."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, local(self.weight).to(x.dtype))


class SharedHeadLinear(Linear):
    """wk or wv where tp has more ranks than there are KV heads. This rank's weight is one head's rows, which other
    ranks hold too. Each uses it for its own query heads, so the gradient here is one term of a sum over `kv_replicate`
    (`Partial`), completed once per step by `gradients.reduce_partial`."""

    def forward(self, x: Tensor) -> Tensor:
        weight = cast(DTensor, self.weight).to_local(grad_placements=[Shard(0), Partial()])
        return F.linear(x, weight.to(x.dtype))


class RowParallelLinear(Linear):
    """Input features split: this rank's weight is [out, in/t], its result one term of a sum over ranks."""

    leave: Any  # sums the terms: all-reduce, or reduce-scatter over the sequence

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, local(self.weight).to(x.dtype)))


class VocabParallelEmbedding(Embedding):
    """Rows of the table split: ids of other ranks' rows give zeros, and a sum over ranks completes the vectors."""

    leave: Any
    first_row: int

    def forward(self, tokens: Tensor) -> Tensor:
        table = local(self.weight)
        row = tokens - self.first_row
        elsewhere = (row < 0) | (row >= table.shape[0])
        x = F.embedding(row.masked_fill(elsewhere, 0), table)
        return self.leave(x.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class SequenceParallelRMSNorm(RMSNorm):
    """A whole weight on a shard of the sequence: its gradient here is one term of a sum over ranks (`Partial`),
    completed once per step by `gradients.reduce_partial`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, cast(DTensor, self.weight).to_local(grad_placements=[Partial()]))


class ReplicatedRMSNorm(RMSNorm):
    """A whole weight on the whole sequence: every rank computes the whole gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, local(self.weight))


class _VocabParallelLoss(torch.autograd.Function):
    """Sum over tokens of log sum exp(logits) - logits[target], from a shard of the vocabulary.

    Two all-reduces, of N maxima and of N sums of exponentials with N target logits. Kept for the backward: the logits
    as they came; softmax is computed again from them.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, first_column: int, group: ProcessGroup) -> Tensor:
        x = upcast(logits_NV)
        valid = targets_N != IGNORE_INDEX
        column = targets_N - first_column
        here = valid & (column >= 0) & (column < x.shape[-1])
        column = column.masked_fill(~here, 0)
        top = collectives.max_of(x.amax(-1), group)
        target = (x.gather(-1, column.unsqueeze(-1)).squeeze(-1) - top).masked_fill(~here, 0.0)
        total, target = collectives.sum_of(torch.stack(((x - top.unsqueeze(-1)).exp().sum(-1), target)), group)
        ctx.save_for_backward(logits_NV, top + total.log(), column, here, valid)
        return (total.log() - target).masked_fill(~valid, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, log_total, column, here, valid = ctx.saved_tensors
        softmax = (upcast(logits_NV) - log_total.unsqueeze(-1)).exp()
        is_target = here.to(softmax.dtype).unsqueeze(-1)
        grad_NV = softmax.scatter_add(-1, column.unsqueeze(-1), -is_target) * (grad * valid).unsqueeze(-1)
        return grad_NV.to(logits_NV.dtype), None, None, None


class VocabParallelCrossEntropy(nn.Module):
    """`CrossEntropy` on this rank's vocabulary shard of the logits, which are never gathered."""

    def __init__(self, first_column: int, group: ProcessGroup) -> None:
        super().__init__()
        self.first_column, self.group = first_column, group

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return _VocabParallelLoss.apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), self.first_column, self.group)


def _gather_logits(module: nn.Module, args: Any, logits: Tensor, *, vocab_size: int, group: ProcessGroup) -> Tensor:
    width = len(chunk(vocab_size, group.size(), 0))  # gathered shards are equal: the last ones are padded, and cut
    logits = F.pad(logits, (0, width - logits.shape[-1]))
    return collectives.all_gather_replicated(logits, logits.ndim - 1, group)[..., :vocab_size]


def boundaries(group: ProcessGroup, *, sequence_parallel: bool) -> tuple[Any, Any]:
    """How activations enter a region of split weights, and how its terms are summed when they leave it."""
    if sequence_parallel:
        return (
            partial(collectives.all_gather, dim=SEQUENCE_DIM, group=group),
            partial(collectives.reduce_scatter, dim=SEQUENCE_DIM, group=group),
        )
    return partial(collectives.enter, group=group), partial(collectives.all_reduce, group=group)


def pipeline_products(group: ProcessGroup) -> None:
    """Async TP (Wang et al. 2023; torch's `_micro_pipeline_tp`): inductor writes a gather and the products of its
    result, or a product and its reduce-scatter, as one operator that works in pieces, so that sending one hides behind
    multiplying another. Its pieces travel by symmetric memory, which ranks of one NVLink domain have.

    Private (torch 2.11 to 2.13), and of NCCL alone (`Spmd.needed_backend`).
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


def apply_tp(
    model: Transformer, mesh: DeviceMesh, heads: DeviceMesh | None, *, sequence_parallel: bool, loss_parallel: bool
) -> None:
    """Split a model on meta over the 1-D `mesh`, in place; not mixtures of experts (`expert.py`). Nothing is sent.
    `heads`: what `head_mesh` gives for `mesh`."""
    group, vocab_size = mesh.get_group(), model.config.vocab_size
    first_row = chunk(vocab_size, mesh.size(), mesh.get_local_rank()).start
    join, leave = boundaries(group, sequence_parallel=sequence_parallel)
    norm_class = SequenceParallelRMSNorm if sequence_parallel else ReplicatedRMSNorm

    def entry(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (join(args[0]), *args[1:])

    def split(module: Any, to: type[nn.Module], placement: Placement) -> None:
        module.__class__ = to  # the same module with another forward: parameter names and hooks stay
        shard_weight(module, mesh, placement)

    def split_heads(module: Any) -> None:
        if heads is None:
            split(module, ColumnParallelLinear, Shard(0))
        else:
            module.__class__ = SharedHeadLinear
            shard_weight(module, heads, Shard(0), Replicate())

    def split_rows(module: Any) -> None:
        split(module, RowParallelLinear, Shard(1))
        module.leave = leave

    layers: Iterable[Any] = model.layers.values()
    for layer in layers:
        for norm in (layer.attention_norm, layer.feed_forward_norm):
            split(norm, norm_class, Replicate())
        attention, feed_forward = layer.attention, layer.feed_forward
        split(attention.wq, ColumnParallelLinear, Shard(0))
        for linear in (attention.wk, attention.wv):
            split_heads(linear)
        split_rows(attention.wo)
        attention.register_forward_pre_hook(entry)
        if isinstance(feed_forward, FeedForward):
            for linear in (feed_forward.gate, feed_forward.up):
                split(linear, ColumnParallelLinear, Shard(0))
            split_rows(feed_forward.down)
            feed_forward.register_forward_pre_hook(entry)
    if (embed := cast(Any, model.embed)) is not None:
        split(embed, VocabParallelEmbedding, Shard(0))
        embed.leave, embed.first_row = leave, first_row
    if model.norm is not None:
        split(model.norm, norm_class, Replicate())
    if model.head is not None:
        split(model.head, ColumnParallelLinear, Shard(0))
        model.head.register_forward_pre_hook(entry)
        if loss_parallel:
            model.loss = VocabParallelCrossEntropy(first_row, group)
        else:
            model.head.register_forward_hook(partial(_gather_logits, vocab_size=vocab_size, group=group))
    model.tie()
