"""The rules of data parallelism. `train/command/idle.py` refuses an option whose technique is not used."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules import idle
from train.config.rules.idle import Condition
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


READ_BY_FSDP = {
    "strategy.reshard_after_forward": Condition(
        ("strategy.zero_stage", "strategy.pp"),
        lambda stage, pp: stage == 3 or pp is not None,
        "has no effect with strategy.zero_stage={}: parameters stay gathered until the end of the step",
        lambda config: ("strategy.zero_stage=3",),
    )
}
COMPRESSES = Condition(
    ("strategy.comm_hook",),
    lambda hook: hook == "powersgd",
    "has no effect with strategy.comm_hook={}",
    lambda config: ("strategy.comm_hook=powersgd",),
)
READ_BY_DDP = {"strategy.powersgd_rank": COMPRESSES, "strategy.powersgd_start_step": COMPRESSES}

FSDP_RULES = (
    Rule("zero_stage", "a pipeline's schedule gathers and reduces once per step, as ZeRO-1 does", zero_stage),
    *idle.rules(READ_BY_FSDP),
)
DDP_RULES = (
    Rule("comm_hook", "a communication hook must be one of those that exist", comm_hook),
    *idle.rules(READ_BY_DDP),
)
