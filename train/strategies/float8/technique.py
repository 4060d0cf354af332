"""Products in 8 bits as a `Technique`; `apply.py` explains how it works. Its keys are precision and
train.fp8_scaling."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.schema import Precision
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.float8.rules import RULES


def applies(plan: Plan) -> bool:
    return plan.config.precision is Precision.fp8


def apply(target: Target) -> None:
    from train.strategies.float8.apply import apply_float8

    apply_float8(target)


FLOAT8 = Technique("products in 8 bits", (), Strategy, applies, RULES, apply=apply)
