"""Activation checkpointing: keep few of a layer's activations, and run its forward again in the backward (Chen et al.
2016).

`full` keeps only the layer's input. `selective` also keeps the outputs of KEPT_OPS, which need much computation and
little memory, and recomputes the others (Korthikanti et al. 2022, section 5, with another choice of operators). The
recomputation draws the same dropout masks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from train.config.schema import ActivationCheckpointing

KEPT_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
]


def apply_checkpointing(
    layer: nn.Module, mode: ActivationCheckpointing, *, splits_backward: bool = False, compiled: bool = False
) -> None:
    """Make the layer's backward recompute its forward. `splits_backward`: the backward has two passes, one for the
    gradients of inputs and one for those of weights, and both recompute. `compiled`: the layer will be compiled as a
    whole."""
    if mode is ActivationCheckpointing.none:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if mode is ActivationCheckpointing.selective:
        # torch's own contexts allow one pass only, so a split backward needs others; but only torch's can be compiled
        torchs = partial(create_selective_checkpoint_contexts, KEPT_OPS)
        options["context_fn"] = keep_and_replay if splits_backward else torchs
    elif compiled:  # without contexts, torch 2.11 would keep the results of all collectives in the layer
        options["context_fn"] = partial(create_selective_checkpoint_contexts, [])
    # This is an attribute of the instance and not a wrapper module, so that parameters keep their global names.
    layer.forward = partial(checkpoint, layer.forward, **options)


def keep_and_replay() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The contexts of a forward and of its recomputations, of which there may be several. The kept outputs live as long
    as the autograd graph."""
    kept: Kept = defaultdict(list)
    return _Keep(kept), _Replay(kept)


Kept = defaultdict[Any, list[Any]]  # the outputs of an operator's calls, by operator


class _Keep(TorchDispatchMode):
    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in KEPT_OPS:
            self.kept[func].append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _Replay(TorchDispatchMode):
    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self.kept = kept

    def __enter__(self) -> Any:
        self.calls: dict[Any, int] = defaultdict(int)
        return super().__enter__()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in KEPT_OPS:
            return func(*args, **(kwargs or {}))
        call = self.calls[func]
        self.calls[func] += 1
        return tree_map_only(Tensor, Tensor.detach, self.kept[func][call])
