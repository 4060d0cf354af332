"""Rounding of weights and activations to few bits and back, whose gradient passes through (Bengio et al. 2013).

The formulas are those of torchao's Int8DynamicActivationIntxWeightConfig with 4-bit weights in groups of 32 and
weight_mapping_type=SYMMETRIC_NO_CLIPPING_ERR, by which a trained model is converted: a test compares both to the bit.
torchao's own fake quantisers have neither this mapping nor float64, in which strategies are proven. Its mapping
SYMMETRIC divides the largest weight of a group by 7.5, so that this weight is in the middle between two steps, and the
last bit decides between them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.model.numerics import upcast
from train.strategies.quantise.rules import GROUP

INT4, INT8 = (-8, 7), (-128, 127)


class _Round(torch.autograd.Function):
    """Rounds to whole numbers; the gradient passes as if nothing was rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def rounded_weight(weight_OI: Tensor) -> Tensor:
    """The weight [O, I] in 16 steps, with one scale for each GROUP of neighbouring inputs. The largest weight of a
    group is on the first or on the last step."""
    groups = upcast(weight_OI).unflatten(-1, (-1, GROUP))
    with torch.no_grad():
        low, high = INT4
        least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = torch.maximum(least / low, most / high).clamp(min=torch.finfo(groups.dtype).smallest_normal)
    steps = _Round.apply(groups * (1.0 / scale)).clamp(low, high)
    return (steps * scale).flatten(-2).to(weight_OI.dtype)


def rounded_activation(x: Tensor) -> Tensor:
    """Activations in 256 steps from the smallest to the largest feature of each token, among which 0 is exact."""
    wide = upcast(x)
    with torch.no_grad():
        low, high = INT8
        least, most = wide.amin(-1, keepdim=True).clamp(max=0), wide.amax(-1, keepdim=True).clamp(min=0)
        scale = ((most - least) / (high - low)).clamp(min=torch.finfo(wide.dtype).smallest_normal)
        zero = (low - (least / scale).round()).clamp(low, high)
    steps = (_Round.apply(wide * (1.0 / scale)) + zero).clamp(low, high)
    return ((steps - zero) * scale).to(x.dtype)
