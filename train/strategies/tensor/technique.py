"""Tensor parallelism as a `Technique`; `apply.py` explains how it works."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Target, Technique
from train.strategies.tensor.keys import TensorKeys
from train.strategies.tensor.rules import RULES
from train.strategies.tensor.split import split
from train.strategies.tensor.traffic import traffic


def applies(plan: Plan) -> bool:
    strategy = plan.config.strategy
    return isinstance(strategy, TensorKeys) and strategy.tp is not None


def apply(target: Target) -> None:
    from train.strategies.tensor.apply import apply_tp

    apply_tp(target)


TENSOR = Technique("tensor parallelism", ("tp",), TensorKeys, applies, RULES, split=split, traffic=traffic, apply=apply)
