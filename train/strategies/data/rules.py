"""Rules of data parallelism: options that would do nothing, or something else than they say."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.strategies.pipeline.strategy import Pipeline
from train.strategies.spmd import COMM_HOOKS, Spmd


def comm_hook(plan: Plan) -> Finding | None:
    name = plan.option("comm_hook", "none")
    if name in COMM_HOOKS:
        return None
    return Finding(f"strategy.comm_hook={name} is not known", tuple(f"strategy.comm_hook={h}" for h in COMM_HOOKS))


def hook_needs_ddp(plan: Plan) -> Finding | None:
    strategy = plan.config.strategy
    if not isinstance(strategy, Spmd) or strategy.comm_hook not in [*COMM_HOOKS][1:] or strategy.uses_ddp():
        return None
    message = f"strategy.comm_hook={strategy.comm_hook} is DDP's, which strategy={strategy.name} does not use here"
    return Finding(message, ("strategy.comm_hook=none",))


def offload_needs_fsdp(plan: Plan) -> Finding | None:
    strategy = plan.config.strategy
    if not isinstance(strategy, Spmd) or not strategy.cpu_offload or strategy.uses_fsdp():
        return None
    message = f"strategy.cpu_offload=true is FSDP's, which strategy={strategy.name} does not use here"
    return Finding(message, ("strategy.cpu_offload=false",))


def zero_stage(plan: Plan) -> Finding | None:
    strategy = plan.config.strategy
    if not isinstance(strategy, Spmd):
        return None  # DeepSpeed has rules of its own
    if isinstance(strategy, Pipeline):
        wanted, why = 1, "a pipeline's schedule runs FSDP as ZeRO-1"
    elif not strategy.uses_fsdp():
        wanted, why = 3, f"without FSDP, strategy={strategy.name} has no stage to choose"
    else:
        return None
    if strategy.zero_stage == wanted:
        return None
    return Finding(f"strategy.zero_stage={strategy.zero_stage}, but {why}", (f"strategy.zero_stage={wanted}",))


RULES = (
    Rule("comm_hook", "gradients are compressed in one of these ways", comm_hook),
    Rule("comm_hook_needs_ddp", "FSDP and the other axes sum gradients without a hook", hook_needs_ddp),
    Rule("cpu_offload_needs_fsdp", "what FSDP shards is what waits in host memory", offload_needs_fsdp),
    Rule("zero_stage", "a stage says what FSDP keeps sharded within a step", zero_stage),
)
