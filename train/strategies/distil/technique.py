"""Distillation as a `Technique`; `apply.py` explains how it works. Its keys are train.teacher and train.distil_…"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.distil.rules import RULES


def applies(plan: Plan) -> bool:
    return plan.config.train.teacher is not None


def apply(target: Target) -> None:
    from train.strategies.distil.apply import apply_distillation

    apply_distillation(target)


DISTIL = Technique("distillation", (), Strategy, applies, RULES, apply=apply)
