"""Quantisation-aware training (Jacob et al. 2018): every linear layer computes with the numbers that it will have after
it is quantised, so that training makes up for the rounding. The weights that are updated and saved stay whole.

`8da4w` is int8 for activations, whose range is that of each token, and int4 for weights, in groups of GROUP inputs. The
linear layers are those of attention, of dense and of shared feed-forwards, and the head. The embedding, norms, routers
and the experts of a mixture, which are no linear layers, are not rounded, nor is a head that shares its weight with the
embedding. An evaluation computes in the same way, so that its loss is that of the quantised model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.config.technique import Target
from train.model.transformer import Linear
from train.strategies.quantise.rounding import rounded_activation, rounded_weight


class RoundedLinear(Linear):
    """y = x W^T with rounded x and W."""

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return rounded_activation(x), rounded_weight(self.weight.to(x.dtype))


def apply_rounding(target: Target) -> None:
    """Make every linear layer a `RoundedLinear`. It stays the same module, with its names and hooks."""
    tied = target.model.head if target.model.config.tie_embeddings else None
    linear = [module for module in target.model.modules() if type(module) is Linear]
    modules: list[torch.nn.Module] = [module for module in linear if module is not tied]
    for module in modules:
        module.__class__ = RoundedLinear
