"""The rules of distillation."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule

OFF = "train.teacher=null"


def whole_model(plan: Plan) -> Finding | None:
    if "pp" not in plan.axes:
        return None
    message = f"train.teacher={plan.config.train.teacher} is not supported with strategy.pp={plan.axes['pp']}"
    return Finding(message, (OFF,), "use a strategy without a pipeline, such as fsdp")


RULES = (
    Rule(
        "distil_pipeline",
        "a schedule passes on activations of one model, and the last stage would need the teacher's too",
        whole_model,
    ),
)
