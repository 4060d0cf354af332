"""Compilation as a `Technique`: it compiles each transformer block, and the loss. Its keys are those of `compile`.

Parts of a mixture of experts are not compiled: what counts the routers' choices, and the exchange of tokens over `ep`,
whose sizes follow from the data (`torch.compiler.disable`). Experts that run as grouped products are compiled by
themselves, so that they are compiled inside such an exchange too.
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique


def applies(plan: Plan) -> bool:
    return plan.config.compile.enabled


def apply(target: Target) -> None:
    """Compile only `forward`, so that hooks that data parallelism adds later run outside, in eager Python."""
    import torch

    from train.model.moe import Experts

    layers = target.model.layers
    grouped = target.mesh.device_type == "cuda" and target.model.compute_dtype is torch.bfloat16
    experts = [module for module in layers.modules() if isinstance(module, Experts)] if grouped else []
    for module in (*layers.values(), *experts, target.model.loss):
        module.forward = torch.compile(module.forward, mode=target.config.compile.mode.value)


COMPILE = Technique("compilation", (), Strategy, applies, apply=apply)
