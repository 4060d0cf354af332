"""The rules of inputs in the host's memory."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import ActivationCheckpointing

SAID = "train.offload_activations=true"
OFF = "train.offload_activations=false"


def full(plan: Plan) -> Finding | None:
    found = plan.config.train.activation_checkpointing
    if found is ActivationCheckpointing.full:
        return None
    message = f"{SAID} is not supported with train.activation_checkpointing={found.value}"
    return Finding(message, ("train.activation_checkpointing=full", OFF))


def pipeline(plan: Plan) -> Finding | None:
    if "pp" not in plan.axes:
        return None
    return Finding(f"{SAID} is not supported with strategy={plan.config.strategy.name}", (OFF,))


RULES = (
    Rule("offload_full", "with full recomputation a layer keeps its input alone", full),
    Rule("offload_pipeline", "a schedule keeps the inputs and results of stages on the device", pipeline),
)
