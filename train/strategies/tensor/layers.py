"""The layers of a transformer, each with a shard of its weight. `apply.py` uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Shard, distribute_tensor
from torch.nn import functional as F

from train.model.moe import Router
from train.model.transformer import IGNORE_INDEX, Embedding, Linear, RMSNorm, upcast
from train.ranks import collectives
from train.ranks.gradients import local


def shard_weight(module: Any, mesh: DeviceMesh, *placements: Placement) -> None:
    """Declare the module's weight (on meta) as a DTensor over the tp mesh."""
    weight = distribute_tensor(module.weight.detach(), mesh, placements, src_data_rank=None)
    module.weight = nn.Parameter(weight)


class ColumnParallelLinear(Linear):
    """Output features are split: this rank's weight is [out/t, in]. The input is whole on every rank."""

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, local(self.weight).to(x.dtype)


class SharedHeadLinear(Linear):
    """wk or wv if tp has more ranks than there are KV heads. This rank's weight is the rows of one head, which other
    ranks hold too. Each uses it for its own query heads, so the gradient here is one term of a sum over `kv_replicate`
    (`Partial`), which `gradients.reduce_partial` completes once per step."""

    def forward(self, x: Tensor) -> Tensor:
        weight = local(self.weight, (Shard(0), Partial()))
        return F.linear(x, weight.to(x.dtype))


class RowParallelLinear(Linear):
    """Input features are split: this rank's weight is [out, in/t], and its result is one term of a sum over ranks."""

    leave: Any  # sums the terms: all-reduce, or reduce-scatter of the tokens

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.linear(x, local(self.weight).to(x.dtype)))


class VocabParallelEmbedding(Embedding):
    """Rows of the table are split: ids of other ranks' rows give zeros, and a sum over ranks completes the vectors."""

    leave: Any
    first_row: int

    def forward(self, tokens: Tensor) -> Tensor:
        table = local(self.weight)
        row = tokens - self.first_row
        elsewhere = (row < 0) | (row >= table.shape[0])
        x = F.embedding(row.masked_fill(elsewhere, 0), table)
        return self.leave(x.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class SequenceParallelRMSNorm(RMSNorm):
    """The weight is whole and the tokens are sharded, so the gradient here is one term of a sum over ranks
    (`Partial`), which `gradients.reduce_partial` completes once per step."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, local(self.weight, (Partial(),)))


class ReplicatedRMSNorm(RMSNorm):
    """The weight and the sequence are whole, so every rank computes the whole gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, local(self.weight))


class TensorParallelRouter(Router):
    """The weight and the sequences are whole, but the gradient is one term of a sum over `tp`: see `mixture.py`."""

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(x_BTD, local(self.weight, (Partial(),)))


class _VocabParallelLoss(torch.autograd.Function):
    """The sum over tokens of log sum exp(logits) - logits[target], from a shard of the vocabulary.

    It needs two all-reduces: one of N maxima, and one of N sums of exponentials with N target logits. The logits are
    kept for the backward, which computes the softmax again.
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
    """`CrossEntropy` on this rank's shard of the logits over the vocabulary. The logits are never gathered."""

    def __init__(self, first_column: int, group: ProcessGroup) -> None:
        super().__init__()
        self.first_column, self.group = first_column, group

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        return _VocabParallelLoss.apply(logits_BTV.flatten(0, 1), targets_BT.flatten(), self.first_column, self.group)
