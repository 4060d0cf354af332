"""DeepSpeed's engines as a `Technique`. strategies/memory.py has what their ranks hold; what they send is not known."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.technique import Technique
from train.strategies.deepspeed.rules import READ_BY_DEEPSPEED, RULES
from train.strategies.deepspeed.strategy import DeepSpeed


def applies(plan: Plan) -> bool:
    return isinstance(plan.config.strategy, DeepSpeed)


DEEPSPEED = Technique("DeepSpeed", (), DeepSpeed, applies, RULES, read_when=READ_BY_DEEPSPEED)
