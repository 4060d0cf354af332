"""Rules of going on without lost ranks (`runtime.elastic`)."""

from __future__ import annotations

from collections.abc import Callable

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import Optimiser

OFF = "runtime.elastic=false"


def _refuses(says: Callable[[Plan], str], *fixes: str) -> Callable[[Plan], Finding | None]:
    """A check that an elastic run does not have what `says` names; it gives no text if the plan does not have it."""

    def check(plan: Plan) -> Finding | None:
        text = says(plan) if plan.config.runtime.elastic else ""
        return Finding(f"runtime.elastic=true {text}", (*fixes, OFF)) if text else None

    return check


def _parts_of_state(plan: Plan) -> str:
    strategy, axes = plan.config.strategy, [*plan.axes]
    if (strategy.uses_ddp() and axes == ["dp_replicate"]) or (
        strategy.uses_fsdp() and axes == ["dp_replicate", "dp_shard"]
    ):
        return ""
    restart = "launch.local's restarts=N starts all ranks again from the newest checkpoint instead"
    return f"needs copies of the whole state, but strategy={strategy.name} holds each part once ({restart})"


def _mixture(plan: Plan) -> str:
    experts = plan.config.model.num_experts
    return f"is not supported with a mixture of experts (model.num_experts={experts})" if experts else ""


def _power_sgd(plan: Plan) -> str:
    hook = getattr(plan.config.strategy, "comm_hook", "none")
    return f"is not supported with strategy.comm_hook={hook}" if hook == "powersgd" else ""


def _compiled(plan: Plan) -> str:
    return "is not supported with compile.enabled=true" if plan.config.compile.enabled else ""


def _teacher(plan: Plan) -> str:
    teacher = plan.config.train.teacher
    return f"is not supported with train.teacher={teacher}" if teacher is not None else ""


def _eight_bit(plan: Plan) -> str:
    eight_bit = plan.config.optim.name is Optimiser.adamw8bit
    return "is not supported with optim=adamw8bit" if eight_bit else ""


def _trackers(plan: Plan) -> str:
    names = ",".join(tracker.value for tracker in plan.config.metrics.trackers)
    return f"is not supported with metrics.trackers=[{names}]" if names else ""


RULES = (
    Rule("elastic_state", "what only a lost rank held is in a checkpoint only", _refuses(_parts_of_state)),
    Rule("elastic_mixture", "the rows that fill up a batch would be routed and counted", _refuses(_mixture)),
    Rule(
        "elastic_hook",
        "PowerSGD's factors and errors belong to the ranks of a group",
        _refuses(_power_sgd, "strategy.comm_hook=none"),
    ),
    Rule(
        "elastic_compile",
        "every change of the ranks would compile all blocks again",
        _refuses(_compiled, "compile.enabled=false"),
    ),
    Rule(
        "elastic_teacher",
        "every change of the ranks would read the teacher again",
        _refuses(_teacher, "train.teacher=null"),
    ),
    Rule(
        "elastic_eight_bit",
        "moments in 8 bits would be rounded once more with every change of the ranks",
        _refuses(_eight_bit, "optim.name=adamw"),
    ),
    Rule(
        "elastic_trackers",
        "every change of the ranks would start another run of the tracker",
        _refuses(_trackers, "metrics.trackers=[]"),
    ),
)
