"""The matrices that are made smaller: those of every linear layer. The embedding and the norms stay float32.

A head that shares its weight with the embedding stays float32 with it. A mixture of experts is refused, as most of its
weights are no linear layers, and no runtime here computes with small ones.
"""

from __future__ import annotations

from torch import nn

from train.config.problems import BadInput, Problem
from train.config.schema import ModelConfig
from train.model.transformer import Transformer


def linear_layers(model: Transformer) -> dict[str, nn.Linear]:
    """The linear layers by the names of their weights."""
    tied = model.head if model.config.tie_embeddings else None
    found = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if module is not tied}


def check_dense(config: ModelConfig, method: str) -> None:
    """Raise BadInput for a mixture of experts."""
    if config.num_experts:
        message = f"method={method} makes linear layers smaller, but most weights of model.num_experts="
        message += f"{config.num_experts} are in experts, which are none"
        raise BadInput(Problem("mixture", message, "compress a run with model.num_experts=0"))


def check_columns(model: Transformer, multiple: int, method: str) -> None:
    """Raise BadInput unless the columns of every matrix are a multiple."""
    for name, layer in linear_layers(model).items():
        if layer.in_features % multiple:
            message = f"method={method} takes {multiple} columns together, but {name} has {layer.in_features}"
            raise BadInput(Problem("columns", message, f"train a model whose widths are multiples of {multiple}"))
