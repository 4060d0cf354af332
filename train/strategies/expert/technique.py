"""Expert parallelism, and mixtures of experts without it, as a `Technique`; `apply.py` explains how it works."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Target, Technique
from train.strategies.expert.keys import ExpertKeys
from train.strategies.expert.rules import RULES
from train.strategies.expert.split import split
from train.strategies.expert.traffic import traffic


def applies(plan: Plan) -> bool:
    """Whether the model is a mixture, whose auxiliary loss is a mean over all ranks, or `ep` is named."""
    return plan.config.model.num_experts > 0 or plan.config.strategy.expert_degree() is not None


def apply(target: Target) -> None:
    from train.strategies.expert.apply import apply_experts

    apply_experts(target)


EXPERT = Technique("expert parallelism", ("ep",), ExpertKeys, applies, RULES, split=split, traffic=traffic, apply=apply)
