"""Context parallelism as a `Technique`; `apply.py` explains how it works."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Target, Technique
from train.strategies.context.keys import ContextKeys
from train.strategies.context.rules import RULES
from train.strategies.context.traffic import traffic


def applies(plan: Plan) -> bool:
    strategy = plan.config.strategy
    return isinstance(strategy, ContextKeys) and strategy.cp is not None


def apply(target: Target) -> None:
    from train.strategies.context.apply import apply_cp

    seq_len, method = target.config.train.seq_len, target.keys(ContextKeys).cp_method
    apply_cp(target.model, target.mesh["cp"], method=method, seq_len=seq_len)


CONTEXT = Technique("context parallelism", ("cp",), ContextKeys, applies, RULES, traffic=traffic, apply=apply)
