"""Compilation as a `Technique`: it compiles each transformer block, and the loss. Its key is `compile.enabled`.

Parts of a mixture of experts stay eager (`torch.compiler.disable`): what counts the routers' choices, because a
compiled backward cannot update buffers; and the exchange of tokens over `ep` with the experts inside it, because their
sizes follow from the data. To compile the experts for any number of rows took more than a minute on an H200 (torch
2.11).
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique


def applies(plan: Plan) -> bool:
    return plan.config.compile.enabled


def apply(target: Target) -> None:
    from train.strategies.compile.apply import compile_blocks

    compile_blocks(target)


COMPILE = Technique("compilation", (), Strategy, applies, apply=apply)
