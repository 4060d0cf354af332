"""Rules of data parallelism. An option whose technique is not used is refused in `techniques.py`."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.strategies.data.keys import COMM_HOOKS, DdpKeys, FsdpKeys


def comm_hook(plan: Plan) -> Finding | None:
    name = plan.keys(DdpKeys).comm_hook
    if name in COMM_HOOKS:
        return None
    return Finding(f"strategy.comm_hook={name} is not known", tuple(f"strategy.comm_hook={h}" for h in COMM_HOOKS))


def zero_stage(plan: Plan) -> Finding | None:
    stage = plan.keys(FsdpKeys).zero_stage
    if "pp" not in plan.axes or stage == 1:
        return None
    return Finding(
        f"strategy.zero_stage={stage}, but a pipeline's schedule runs FSDP as ZeRO-1", ("strategy.zero_stage=1",)
    )


FSDP_RULES = (Rule("zero_stage", "a stage says what FSDP keeps sharded within a step", zero_stage),)
DDP_RULES = (Rule("comm_hook", "gradients are compressed in one of these ways", comm_hook),)
