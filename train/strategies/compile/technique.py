"""Compilation as a `Technique`: it compiles each transformer block, and the loss. Its keys are those of `compile`.

Parts of a mixture of experts stay eager (`torch.compiler.disable`): what counts the routers' choices, because a
compiled backward cannot update buffers; and the exchange of tokens over `ep` with the experts inside it, because their
sizes follow from the data. To compile the experts for any number of rows took more than a minute on an H200 (torch
2.11).
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.schema import Precision
from train.config.strategy import Strategy
from train.config.technique import Target, Technique


def applies(plan: Plan) -> bool:
    return plan.config.compile.enabled


def apply(target: Target) -> None:
    """Compile only `forward`, so that hooks that data parallelism adds later run outside, in eager Python."""
    import torch
    from torch._inductor import list_mode_options

    options = list_mode_options(target.config.compile.mode.value)
    if target.config.precision is Precision.fp8:
        # A compiled kernel keeps float32 between two casts that it fuses. It would round a float32 weight to 8 bits at
        # once, but a weight that FSDP gathered in bf16 twice, and gradients would differ by up to 16 %.
        options["emulate_precision_casts"] = True
    for module in (*target.model.layers.values(), target.model.loss):
        module.forward = torch.compile(module.forward, options=options)


COMPILE = Technique("compilation", (), Strategy, applies, apply=apply)
