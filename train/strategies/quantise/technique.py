"""Quantisation-aware training as a `Technique`; `apply.py` explains how it works. Its key is train.qat."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.schema import Qat
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.quantise.rules import RULES


def applies(plan: Plan) -> bool:
    return plan.config.train.qat is not Qat.none


def apply(target: Target) -> None:
    from train.strategies.quantise.apply import apply_rounding

    apply_rounding(target)


QUANTISE = Technique("quantisation-aware training", (), Strategy, applies, RULES, apply=apply)
