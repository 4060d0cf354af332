"""Inputs of layers in the host's memory as a `Technique`; `apply.py` explains how it works. Its key is
train.offload_activations."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.strategy import Strategy
from train.config.technique import Target, Technique
from train.strategies.offload.rules import RULES


def applies(plan: Plan) -> bool:
    return plan.config.train.offload_activations


def apply(target: Target) -> None:
    from train.strategies.offload.apply import apply_offloading

    apply_offloading(target)


OFFLOAD = Technique("offloaded activations", (), Strategy, applies, RULES, apply=apply)
