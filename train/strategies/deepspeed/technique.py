"""DeepSpeed's engines as the lab asks for them. They split and send by rules of their own (strategies/memory.py)."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Technique
from train.strategies.deepspeed.rules import RULES
from train.strategies.deepspeed.strategy import DeepSpeed


def applies(plan: Plan) -> bool:
    return isinstance(plan.config.strategy, DeepSpeed)


DEEPSPEED = Technique("DeepSpeed", (), DeepSpeed, applies, RULES)
