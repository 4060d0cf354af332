"""The rules of activation checkpointing."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.rule import Finding, Rule
from train.config.schema import ActivationCheckpointing


def compiled_on_cpu(plan: Plan) -> Finding | None:
    """For weights that tensor parallelism splits, torch 2.13 passes a device mesh from a compiled forward to its
    backward. It puts the mesh before the states of random generators and looks for it after them. Such states exist if
    an operator runs again that may draw numbers: on a CPU that is attention, even without dropout. On CUDA devices the
    states go another way."""
    config, mode = plan.config, plan.config.train.activation_checkpointing
    draws = mode is ActivationCheckpointing.full or config.model.dropout > 0  # selective keeps attention's output
    if not (config.compile.enabled and "tp" in plan.axes and draws) or config.model.num_experts:
        return None
    message = f"train.activation_checkpointing={mode.value} with strategy.tp is not compiled by torch 2.13 for a CPU"
    fixes = ("compile.enabled=false", "train.activation_checkpointing=none")
    return Finding(message, ("train.activation_checkpointing=selective", *fixes))


def early(plan: Plan) -> Finding | None:
    """Before the start, if the device is chosen by then."""
    return compiled_on_cpu(plan) if plan.config.runtime.device == "cpu" else None


def check_device(plan: Plan, device_type: str) -> None:
    """Raises BadInput."""
    if device_type == "cpu" and (found := compiled_on_cpu(plan)) is not None:
        raise BadInput(Problem("recompute_compiled", found.message, f"use {' or '.join(found.fixes)}"))


RULES = (Rule("recompute_compiled", "torch 2.13 mixes up what a compiled layer keeps on a CPU", early),)
