"""A loss in chunks as a `Technique`; `apply.py` explains how it works. Its key is train.loss_chunks."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.chunked_loss.rules import RULES


def applies(plan: Plan) -> bool:
    return plan.config.train.loss_chunks > 1


def apply(target: Target) -> None:
    from train.strategies.chunked_loss.apply import apply_chunks

    apply_chunks(target)


CHUNKED_LOSS = Technique("a loss in chunks", (), Strategy, applies, RULES, apply=apply)
