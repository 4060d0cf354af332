"""The rules of activation checkpointing."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.rule import Finding, Rule
from train.config.schema import ActivationCheckpointing, Config


def compiles_layers(config: Config) -> bool:
    """Whether each layer is compiled as a whole; one with a mixture is compiled in parts."""
    return config.compile.enabled and not config.model.num_experts


def compiled_on_cpu(plan: Plan) -> Finding | None:
    """For weights that tensor parallelism splits, torch 2.13 passes a device mesh from a compiled forward to its
    backward. It puts the mesh before the states of random generators and looks for it after them. Such states exist if
    an operator runs again that may draw numbers: on a CPU that is attention, even without dropout. On CUDA devices the
    states go another way. Torch 2.11 passes no mesh, but is not told apart here."""
    config, train = plan.config, plan.config.train
    draws = config.model.dropout > 0
    keeps = train.activation_checkpointing is ActivationCheckpointing.selective  # attention's result
    if not (compiles_layers(config) and "tp" in plan.axes) or (keeps and not draws):
        return None
    message = f"train.activation_checkpointing={train.activation_checkpointing.value} with strategy.tp is not compiled"
    fixes = ["compile.enabled=false"]
    if not train.offload_activations:
        fixes += ["train.activation_checkpointing=none"]
        fixes += [] if draws else ["train.activation_checkpointing=selective"]
    return Finding(f"{message} for a CPU, where torch 2.13 fails", tuple(fixes))


def early(plan: Plan) -> Finding | None:
    """Before the start, if the device is chosen by then."""
    return compiled_on_cpu(plan) if plan.config.runtime.device == "cpu" else None


def check_device(plan: Plan, device_type: str) -> None:
    """Raises BadInput."""
    if device_type == "cpu" and (found := compiled_on_cpu(plan)) is not None:
        raise BadInput(Problem("recompute_compiled", found.message, f"use {' or '.join(found.fixes)}"))


RULES = (Rule("recompute_compiled", "torch 2.13 mixes up what a compiled layer keeps on a CPU", early),)
