"""The head and the loss in chunks of a microbatch's tokens, so that the logits of one chunk exist at a time, in any
dtype (Hsu et al. 2024, "Liger Kernel", section 3.2).

    chunk of x -> logits -> loss -> gradient of the logits -> gradients of x and of the weight
                  freed             freed

A forward that trains computes the gradients too, chunk after chunk, and its backward only multiplies them by what comes
in. So no product is computed twice. From the forward to the backward, a microbatch keeps the gradients of x (N D) and
of the head's weight (V D) in place of its logits (N V). The weight's gradient adds up in float32 at least.

The loss of a chunk is whatever the loss was before, compiled or split over the vocabulary too. With `tp`, it sends its
maxima and sums for each chunk: the same bytes in more calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from train.config.technique import Target
from train.model.numerics import upcast

Loss = Callable[[Tensor, Tensor], Tensor]  # (logits BTV, targets BT) -> the sum of token losses


def apply_chunks(target: Target) -> None:
    """Let the head pass on its input, which the loss multiplies by the head's weight, chunk by chunk. The head stays a
    module that is called, because FSDP and tensor parallelism have hooks there."""
    head, loss = target.model.head, target.model.loss
    if head is not None:
        loss.forward = partial(loss_in_chunks, head, loss.forward, target.config.train.loss_chunks)
        head.forward = pass_on


def pass_on(x: Tensor) -> Tensor:
    return x


def loss_in_chunks(head: Any, loss: Loss, chunks: int, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum of token losses of what goes into the head."""
    x, weight = head.factors(x_BTD)
    x_ND, targets_N = x.flatten(0, 1), targets_BT.flatten()
    if torch.is_grad_enabled():
        total: Tensor = _LossInChunks.apply(x_ND, weight, targets_N, loss, chunks)
        return total
    total = upcast(x_ND.new_zeros(()))
    for x, targets in in_chunks(chunks, x_ND, targets_N):
        total = total + loss(F.linear(x, weight).unsqueeze(0), targets.unsqueeze(0))
    return total


def in_chunks(chunks: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of parts of the first dimension, whose lengths differ by 1 at the most."""
    return zip(*(tensor.tensor_split(chunks) for tensor in tensors), strict=True)


class _LossInChunks(torch.autograd.Function):
    """The sum of token losses. The forward computes the gradients of x and of the weight; the backward scales them."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, loss: Loss, chunks: int) -> Tensor:
        total = upcast(x_ND.new_zeros(()))
        grad_x = torch.empty_like(x_ND)
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype)
        for x, targets, out in in_chunks(chunks, x_ND, targets_N, grad_x):
            part, grad_logits = loss_and_gradient(loss, x, weight_VD, targets)
            total += part
            torch.mm(grad_logits, weight_VD, out=out)
            if grad_weight.dtype == x.dtype:
                grad_weight.addmm_(grad_logits.t(), x)
            else:
                grad_weight += grad_logits.t() @ x
            del grad_logits  # or it would be there beside the logits of the next chunk
        ctx.save_for_backward(grad_x, grad_weight.to(weight_VD.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # not in place: a schedule that splits the backward comes here twice
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None, None, None


def loss_and_gradient(loss: Loss, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of a chunk, and the gradient of its logits NV."""
    logits = F.linear(x_ND, weight_VD).requires_grad_()
    with torch.enable_grad():
        total = loss(logits.unsqueeze(0), targets_N.unsqueeze(0))
    return total.detach(), torch.autograd.grad(total, logits)[0]
