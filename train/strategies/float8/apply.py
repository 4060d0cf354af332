"""Matrix products of 8-bit floating-point numbers (Micikevicius et al. 2022, "FP8 formats for deep learning").

The linear layers of the blocks scale and round both factors of each of their three products: the output's, the input
gradient's and the weight gradient's. `tensorwise` has one scale for each matrix, and e5m2 for gradients; `rowwise` has
one for each row, and e4m3 for all. Everything else is as in bf16: the embedding, norms, attention, routers and the
experts of a mixture, the head and the loss. Parameters, gradients and optimiser state stay float32.

The products are torchao's (0.18; `matmul_with_hp_or_float8_args` is not public). Scales are powers of two, in both
recipes: then a number is rounded to the same neighbour under every scale, unless it is among the smallest. So ranks
that have other tokens in a matrix round as one device does. On a CPU the same numbers are multiplied in float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Fp8Scaling
from train.config.technique import Target
from train.model.transformer import Linear
from train.strategies.float8.rules import FP8_SINCE


class Float8Linear(Linear):
    """y = x W^T as a product of 8-bit numbers, in x's dtype."""

    products: LinearMMConfig
    recipe: Float8LinearConfig

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight.to(x.dtype).t()
        return matmul_with_hp_or_float8_args.apply(x, weight, self.products, self.recipe)


def apply_float8(target: Target) -> None:
    """Make every linear layer of the blocks a `Float8Linear`. It stays the same module, with its names and hooks.
    Raises BadInput (exit code 3) on a GPU that has no such products."""
    recipe = chosen(target.config.train.fp8_scaling, target.mesh.device_type)
    gemms = (recipe.gemm_config_output, recipe.gemm_config_grad_input, recipe.gemm_config_grad_weight)
    products = LinearMMConfig(*(ScaledMMConfig(recipe.emulate, gemm.use_fast_accum, False, False) for gemm in gemms))
    for layer in target.model.layers.values():
        for module in layer.modules():
            if type(module) is Linear:
                module.__class__ = Float8Linear
                module.recipe, module.products = recipe, products


def chosen(scaling: Fp8Scaling, device_type: str) -> Float8LinearConfig:
    """torchao's recipe, with scales that are powers of two."""
    if device_type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() < FP8_SINCE:
        major, minor = torch.cuda.get_device_capability()
        message = f"precision=fp8 needs a GPU of compute capability 8.9 or later, and this one has {major}.{minor}"
        raise BadInput(Problem("fp8_device", message, "use precision=bf16", exit_code=EXIT_ENVIRONMENT))
    recipe = Float8LinearConfig.from_recipe_name(scaling.value)
    return dataclasses.replace(recipe, round_scales_to_power_of_2=True, emulate=device_type != "cuda")
