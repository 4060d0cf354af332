"""Rules of going on without lost ranks (`runtime.elastic`)."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule

OFF = "runtime.elastic=false"


def whole_state(plan: Plan) -> Finding | None:
    if not plan.config.runtime.elastic or (plan.config.strategy.uses_ddp() and [*plan.axes] == ["dp_replicate"]):
        return None
    name = plan.config.strategy.name
    message = f"runtime.elastic=true needs ranks that each hold the whole state, but those of strategy={name} do not"
    return Finding(message, (OFF, "strategy.dp_replicate=-1"), "use strategy=dp, or runtime.elastic=false")


def no_mixture(plan: Plan) -> Finding | None:
    if not plan.config.runtime.elastic or plan.config.model.num_experts == 0:
        return None
    message = f"runtime.elastic=true is not supported with model.num_experts={plan.config.model.num_experts}"
    return Finding(message, (OFF,), "use a dense model")


def no_state_of_hooks(plan: Plan) -> Finding | None:
    strategy = plan.config.strategy
    if not plan.config.runtime.elastic or getattr(strategy, "comm_hook", "none") != "powersgd":
        return None
    message = "runtime.elastic=true is not supported with strategy.comm_hook=powersgd"
    return Finding(message, (OFF, "strategy.comm_hook=none"), "use another strategy.comm_hook")


RULES = (
    Rule("elastic_state", "what only a lost rank held can come from a checkpoint only", whole_state),
    Rule("elastic_mixture", "the rows that fill up a batch would be routed and counted", no_mixture),
    Rule("elastic_hook", "PowerSGD's factors and errors belong to the ranks that are in the group", no_state_of_hooks),
)
