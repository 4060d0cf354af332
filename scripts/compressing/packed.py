"""The tensors of a compressed model's weights.safetensors, and how they become weights again.

    NAME                         a weight as it is: float32
    NAME.codes, NAME.scales      integers, and what a group of them is multiplied by; 4-bit codes are two in a byte
    NAME.mask, NAME.values       a bit for each weight, in the order of the rows, and the weights whose bit is 1

NAME is the global name of a parameter. Shapes: O rows (outputs), I columns (inputs), G columns in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

CODES, SCALES, MASK, VALUES = ".codes", ".scales", ".mask", ".values"
SUFFIXES = (CODES, SCALES, MASK, VALUES)
OFFSET = 8  # of a 4-bit code: -8 … 7 are stored as 0 … 15


def two_in_a_byte(codes_OI: Tensor) -> Tensor:
    """int8 codes from -8 to 7 as uint8 [O, I/2]: the even column in the low half of the byte."""
    low, high = (codes_OI.to(torch.uint8) + OFFSET & 15).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def one_in_a_byte(packed: Tensor) -> Tensor:
    """The inverse of `two_in_a_byte`: int8 [O, I]."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).to(torch.int8) - OFFSET


def sparse(weight: Tensor) -> dict[str, Tensor]:
    """The mask and the values of a weight, without its zeros."""
    kept = weight.flatten() != 0
    bits = torch.nn.functional.pad(kept, (0, -len(kept) % 8)).unflatten(0, (-1, 8)).to(torch.uint8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8)
    return {MASK: (bits * powers).sum(1, dtype=torch.uint8), VALUES: weight.flatten()[kept].clone()}


def dense(mask: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `sparse`. Raises ValueError if the mask does not fit the shape and the number of values."""
    bits = (mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
    if len(bits) - shape.numel() not in range(8) or int(bits.sum()) != len(values) or bits[shape.numel() :].any():
        raise ValueError(f"a mask of {len(mask)} bytes and {len(values)} values are no weight of {list(shape)}")
    weight = torch.zeros(shape.numel(), dtype=values.dtype)
    weight[bits[: shape.numel()]] = values
    return weight.view(shape)


def owner(key: str) -> str:
    """The name of the parameter that a tensor of the file belongs to."""
    return next((key.removesuffix(suffix) for suffix in SUFFIXES if key.endswith(suffix)), key)
