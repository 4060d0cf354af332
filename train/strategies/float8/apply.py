"""Linear layers that multiply 8-bit floating-point numbers (Micikevicius et al. 2022, "FP8 formats for deep learning").

The linear layers of the blocks scale and round both factors of each of their three products: the output's, the input
gradient's and the weight gradient's. `tensorwise` has one scale for each matrix, and e5m2 for gradients; `rowwise` has
one for each row, and e4m3 for all. Everything else is as in bf16: the embedding, norms, attention, routers and the
experts of a mixture, the head and the loss. Parameters, gradients and optimiser state stay float32.

The recipes are torchao's, with scales that are powers of two in both: then a number is rounded to the same neighbour
under every scale, unless it is among the smallest. So ranks that have other tokens in a matrix round as one device
does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Fp8Scaling
from train.config.technique import Target
from train.model.transformer import Linear
from train.strategies.float8.product import Product
from train.strategies.float8.rules import FP8_SINCE


class Float8Linear(Linear):
    """y = x W^T as a product of 8-bit numbers, in x's dtype."""

    by_row: bool  # whether each row of a factor has its own scale

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = Product.apply(x.flatten(0, -2), self.weight.to(x.dtype), self.by_row)
        return y.unflatten(0, x.shape[:-1])


def apply_float8(target: Target) -> None:
    """Make every linear layer of the blocks a `Float8Linear`. It stays the same module, with its names and hooks.
    Raises BadInput (exit code 3) on a GPU that has no such products."""
    _check_device(target.mesh.device_type)
    layers = target.model.layers.values()
    linears: list[Any] = [module for layer in layers for module in layer.modules() if type(module) is Linear]
    for linear in linears:
        linear.__class__ = Float8Linear
        linear.by_row = target.config.train.fp8_scaling is Fp8Scaling.rowwise


def _check_device(device_type: str) -> None:
    """Raise BadInput if this GPU does not multiply 8-bit numbers."""
    if device_type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() < FP8_SINCE:
        major, minor = torch.cuda.get_device_capability()
        message = f"precision=fp8 needs a GPU of compute capability 8.9 or later, and this one has {major}.{minor}"
        raise BadInput(Problem("fp8_device", message, "use precision=bf16", exit_code=EXIT_ENVIRONMENT))
