"""Pruning: the least important weights of each layer become 0, and the others stay as they are.

The importance of a weight is its size (magnitude), or its size times the norm of the input that it multiplies, over
calibration text (Wanda, Sun et al. 2023). By Wanda's score a row's weights are compared with each other, by magnitude
all of a matrix. Under 2:4, two of each four successive columns stay, which a GPU's sparse products need. As in that
paper, blocks are pruned one after another, each with the inputs that the pruned blocks before it give, and the head
stays as it is.

Shapes: B batch, T sequence, D width, O rows (outputs), I columns (inputs).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train.model.transformer import Transformer

MAGNITUDE, WANDA = "magnitude", "wanda"
ROWS = 8  # sequences of the calibration that are computed at once


def prunable(model: Transformer) -> dict[str, nn.Linear]:
    """The linear layers of all blocks by the names of their weights."""
    named = model.layers.named_modules(prefix="layers")
    return {f"{name}.weight": module for name, module in named if isinstance(module, nn.Linear)}


@torch.no_grad()
def prune(model: Transformer, sparsity: float | None, calibration: Tensor | None) -> None:
    """Prune every block in place. `sparsity`: the share of a matrix that becomes 0; None means 2:4. `calibration`:
    tokens BT for Wanda's score; None means by magnitude."""
    if calibration is None:
        for layer in prunable(model).values():
            layer.weight.mul_(kept(layer.weight.abs(), sparsity, by_row=False))
        return
    assert model.embed is not None
    hidden = [model.embed(rows) for rows in calibration.split(ROWS)]
    for block in model.layers.values():
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        with _input_norms(layers) as squares:
            for x_BTD in hidden:
                block(x_BTD, model.rope)
        for layer in layers:
            score = layer.weight.abs() * squares[layer].sqrt().to(layer.weight.dtype)
            layer.weight.mul_(kept(score, sparsity, by_row=True))
        hidden = [block(x_BTD, model.rope) for x_BTD in hidden]


def kept(score_OI: Tensor, sparsity: float | None, *, by_row: bool) -> Tensor:
    """1 for each weight that stays, 0 for the others, [O, I]. `sparsity`: None means 2:4."""
    if sparsity is None:
        groups, count = score_OI.unflatten(-1, (-1, 4)), 2
    else:
        groups = score_OI if by_row else score_OI.flatten()
        count = round(groups.shape[-1] * (1 - sparsity))
    ones = torch.zeros_like(groups).scatter(-1, groups.topk(count, dim=-1).indices, 1.0)
    return ones.view(score_OI.shape)


@contextmanager
def _input_norms(layers: list[nn.Linear]) -> Iterator[dict[nn.Linear, Tensor]]:
    """The sums of squares [I] of what the layers get within this context, in float64."""
    squares = {
        layer: torch.zeros(layer.in_features, dtype=torch.float64, device=layer.weight.device) for layer in layers
    }

    def add(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear)
        squares[layer] += inputs[0].flatten(0, -2).double().square().sum(0)

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
