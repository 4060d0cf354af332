"""The graph that is exported to every runtime that takes graphs, and the modules that it is made of.

Shapes: L layers, B batch, T tokens, S slots, K key-value heads, E head width. The number of tokens and of slots is
free, so that one graph reads a prompt, continues it and is the plain forward. It is scripts/generating/cache.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from scripts.generating.cache import decode_step, empty_slots
from train.model.transformer import Linear, Transformer


def exported(model: Transformer, *, batched: bool) -> ExportedProgram:
    """The program (tokens BT, position, keys LBKSE, values LBKSE) -> (logits BTV, keys LBKTE, values LBKTE), where S
    may be any number of slots. `batched`: whether B is free too; else it is 1."""
    batch = 2 if batched else 1
    # No two sizes of the example are equal, and none is 1: torch takes such sizes for fixed ones.
    tokens = torch.zeros(batch, 3, dtype=torch.int64)
    keys, values = empty_slots(model, batch, 5)
    most = model.config.max_seq_len
    rows = {0: Dim("batch", min=1)} if batched else {}
    of_slots = {3: Dim("slots", min=1, max=most), **({1: rows[0]} if batched else {})}
    shapes = ({1: Dim("tokens", min=1, max=most), **rows}, None, of_slots, of_slots)
    example = (tokens, torch.zeros(1, dtype=torch.int64), keys, values)
    program = torch.export.export(decode_step(model), example, dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the lines of this program, with the paths of this machine
    return program


def with_linears(model: Transformer, made: Callable[[Tensor], nn.Module]) -> Transformer:
    """A copy of the model with other modules in place of its linear layers, made of their weights. The other parameters
    are those of `model`, and a head that shares the embedding's weight gets a module like every other."""
    memo = {id(parameter): parameter for parameter in model.parameters()}
    result = copy.deepcopy(model, memo)
    for parent in [*result.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, Linear):
                setattr(parent, name, made(child.weight.detach()))
    return result


class Product(nn.Module):
    """x W^T with the transposed weight as it is stored, so that the graph has a plain product with a constant."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def plain_linear(weight: Tensor) -> nn.Linear:
    """torch's own linear layer, which other programs know."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return linear
