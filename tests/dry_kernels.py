"""Imitations of CUDA's kernels for runs with fake tensors on a CPU: they keep and allocate the same tensors.

A CPU has no fused RMSNorm, other kernels for attention, a loop over experts, and a dropout that keeps its noise. The
values have no meaning. Every expert gets the same number of rows.
"""

from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from train.model import moe
from train.strategies.context import apply as context
from train.strategies.context import block_attention
from train.strategies.expert import apply as expert

aten = torch.ops.aten


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32))
        ctx.save_for_backward(x, weight, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


class Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x.new_empty(x.shape[0], weight.shape[1])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def fits_fused(q):
    return q.dtype is torch.bfloat16 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def attention(q, k, v, *, is_causal, enable_gqa):
    """The kernel that torch chooses on an H100."""
    if fits_fused(q):
        return aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, is_causal)[0]
    if q.dtype is torch.float32 and not enable_gqa:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, is_causal)[0]
    return aten._scaled_dot_product_attention_math(q, k, v, None, 0.0, is_causal, enable_gqa=enable_gqa)[0]


def dropout(x, p, training, inplace):
    return aten.native_dropout(x, p, True)[0] if training and p > 0 else x


class Balanced:
    """Routers that send every expert the same number of rows."""

    def __init__(self):
        self.rows, self.sort = 0, moe.sorted_by_expert

    def sorted(self, chosen, num_experts):
        self.rows = chosen.numel()
        return self.sort(chosen, num_experts)

    def tolist(self, x):
        """Numbers of rows, by expert or [sent or received, by rank]."""

        def even(n):
            return [self.rows // n + (i < self.rows % n) for i in range(n)]

        return even(x.shape[0]) if x.ndim == 1 else [even(x.shape[1]) for _ in range(x.shape[0])]


@contextmanager
def imitated():
    balanced = Balanced()
    with ExitStack() as stack:
        for owner, name, instead in (
            (F, "rms_norm", lambda x, shape, weight, eps: Norm.apply(x, weight)),
            (F, "scaled_dot_product_attention", attention),
            (F, "dropout", dropout),
            (context, "preferred_kernel", lambda device: block_attention.Kernel.cudnn),
            (moe, "_can_group", lambda x, gate: x.dtype is torch.bfloat16),
            (moe, "_grouped", lambda x, weight, ends: Grouped.apply(x, weight)),
            (moe, "sorted_by_expert", balanced.sorted),
            (expert, "sorted_by_expert", balanced.sorted),
            (FakeTensor, "tolist", lambda x: balanced.tolist(x)),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield
