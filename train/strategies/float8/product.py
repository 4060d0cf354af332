"""Products of two matrices whose elements are rounded to 8 bits (Micikevicius et al. 2022).

The scale of a matrix, or of each of its rows, is the largest power of two with which its largest element still fits.
It is computed from the bits of that element: a compiled kernel computes it again for every element that it rounds, and
torchao's formula has a division in float64, a logarithm and a power.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 1e-12  # smaller largest elements, and zeros, get the scale of this one, as in torchao
MANTISSA_BITS, BIAS = 23, 127  # of float32


class Rounded(NamedTuple):
    """A matrix as numbers of 8 bits times `unit`, a power of two in float32: one for all, [M, 1] or [1, K]."""

    numbers_MK: Tensor
    unit: Tensor

    def t(self) -> Rounded:
        return Rounded(self.numbers_MK.t(), self.unit.t())


class Product(torch.autograd.Function):
    """x W^T for x [M, K] and W [N, K], in x's dtype, and both gradients: three products of 8-bit numbers. Gradients of
    outputs are rounded to e5m2, which has more range and less precision, unless every row has its own scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, by_row: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.by_row = by_row
        along = 1 if by_row else None
        # torchao's recipes: sums of the forward may be kept in fewer bits, those of gradients may not
        return product(rounded(x, E4M3, along), rounded(weight, E4M3, along), x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        dtype, along, across = (E4M3, 1, 0) if ctx.by_row else (E5M2, None, None)
        grad_x = product(rounded(grad, dtype, along), rounded(weight, E4M3, across).t(), x.dtype)
        grad_weight = product(rounded(grad, dtype, across).t(), rounded(x, E4M3, across).t(), x.dtype)
        return grad_x, grad_weight, None


def product(a_MK: Rounded, b_NK: Rounded, dtype: torch.dtype, *, use_fast_accum: bool = False) -> Tensor:
    """a b^T [M, N] in `dtype`. CUDA needs N and K to be multiples of 16; other devices multiply the same numbers in
    float32. `torch._scaled_mm` is private (torch 2.11 to 2.13); inductor does not know the public one in 2.11."""
    if a_MK.unit.device.type != "cuda" or not torch.version.cuda:
        a, b = (x.numbers_MK.float() * x.unit for x in (a_MK, b_NK))
        return (a @ b.t()).to(dtype)
    return torch._scaled_mm(
        a_MK.numbers_MK.contiguous(),
        b_NK.numbers_MK.contiguous().t(),
        scale_a=a_MK.unit,
        scale_b=b_NK.unit.t(),
        out_dtype=dtype,
        use_fast_accum=use_fast_accum,
    )


def rounded(x_MK: Tensor, dtype: torch.dtype, along: int | None) -> Rounded:
    """x in `dtype`, with one unit for all elements, or one for all along dimension `along`. The unit of an element that
    is infinite or NaN is NaN, so that the result shows it: the cast makes a finite number of infinity."""
    largest = x_MK.abs().amax() if along is None else x_MK.abs().amax(along, keepdim=True)
    exponent = exponent_of_scale(largest, dtype)
    numbers = (x_MK.float() * power_of_two(exponent)).to(dtype)
    return Rounded(numbers, power_of_two(-exponent) + largest.float() * 0)


def exponent_of_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest int32 e with largest * 2^e <= the largest number of `dtype`."""
    fraction, exponent = math.frexp(torch.finfo(dtype).max)
    mantissa = int((2 * fraction - 1) * 2**MANTISSA_BITS)
    bits = largest.float().clamp(min=SMALLEST).view(torch.int32)
    above = ((bits & (2**MANTISSA_BITS - 1)) > mantissa).to(torch.int32)
    return (exponent - 1) - ((bits >> MANTISSA_BITS) - BIAS) - above


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float32, of int32 exponents from -126 to 127."""
    return ((exponent + BIAS) << MANTISSA_BITS).view(torch.float32)
