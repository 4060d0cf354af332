"""How far a student's next-token probabilities are from a teacher's, also where the vocabulary is sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from train.model.numerics import upcast
from train.ranks import collectives


class Divergence(torch.autograd.Function):
    """The sum over tokens of KL(teacher || student), in float32 or float64, with both logits divided by a temperature.
    `counted_N`: the tokens that count. With a `group`, each rank has a shard of the vocabulary: two all-reduces of 2 N
    and one of N numbers give every rank the same sum. The logits are kept for the backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_NV: Tensor,
        teacher_NV: Tensor,
        counted_N: Tensor,
        temperature: float,
        group: ProcessGroup | None,
    ) -> Tensor:
        both = torch.stack((upcast(student_NV), upcast(teacher_NV))) / temperature
        top = both.amax(-1, keepdim=True)
        top = top if group is None else collectives.max_of(top, group)
        total = (both - top).exp().sum(-1, keepdim=True)
        total = total if group is None else collectives.sum_of(total, group)
        student, teacher = (both - top - total.log()).unbind()  # logarithms of probabilities
        apart_N = (teacher.exp() * (teacher - student)).sum(-1)
        apart_N = apart_N if group is None else collectives.sum_of(apart_N, group)
        ctx.temperature = temperature
        ctx.save_for_backward(student_NV, teacher_NV, (top + total.log()), counted_N)
        return apart_N.masked_fill(~counted_N, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        student_NV, teacher_NV, log_total, counted_N = ctx.saved_tensors
        both = torch.stack((upcast(student_NV), upcast(teacher_NV))) / ctx.temperature
        student, teacher = (both - log_total).exp().unbind()
        weight_N = (grad * counted_N / ctx.temperature).unsqueeze(-1)
        return ((student - teacher) * weight_N).to(student_NV.dtype), None, None, None, None
