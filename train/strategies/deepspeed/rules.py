"""The rules of DeepSpeed's engines. They do not apply to other strategies."""

from __future__ import annotations

from collections.abc import Callable

from train.config.plan import Plan
from train.config.rule import Finding, Rule, no_selective_recomputation
from train.config.rules import idle
from train.config.rules.idle import Condition
from train.config.schema import OnNonfinite, Optimiser, Precision, Qat
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.pipeline.rules import too_few_layers
from train.strategies.tensor.rules import BLOCK_RULES


def of_deepspeed(check: Callable[[Plan, DeepSpeed], Finding | None]) -> Callable[[Plan], Finding | None]:
    return lambda plan: check(plan, plan.keys(DeepSpeed))


def precision(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    refused = {Precision.float64, Precision.fp8} | (set() if strategy.tp is None else {Precision.bf16})
    if (found := plan.config.precision) not in refused:
        return None
    where = f"DeepSpeed's strategy.tp={strategy.tp}" if found is Precision.bf16 else f"strategy={strategy.name}"
    return Finding(f"precision={found.value} is not supported with {where}", ("precision=float32", "strategy.tp=null"))


def stages(strategy: DeepSpeed) -> tuple[int, ...]:
    return (3, 2, 1) if strategy.pp is None else (1, 0)


def stage(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    allowed = stages(strategy)
    if strategy.zero_stage in allowed:
        return None
    where = "without strategy.pp" if strategy.pp is None else f"with strategy.pp={strategy.pp}"
    fixes = sorted(allowed, key=lambda s: abs(s - strategy.zero_stage))
    message = f"strategy.zero_stage={strategy.zero_stage} is not supported {where}"
    return Finding(message, tuple(f"strategy.zero_stage={s}" for s in fixes))


def data_axis(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if strategy.zero_stage not in stages(strategy):
        return None  # the rule ds_stage reports it
    sharded = strategy.zero_stage > 0
    right, wrong = ("dp_shard", "dp_replicate") if sharded else ("dp_replicate", "dp_shard")
    degrees = {axis: plan.axes.get(axis) for axis in (right, wrong)}
    if degrees[wrong] is None:
        if degrees[right] is not None or strategy.pp is not None or strategy.tp is not None:
            return None
        return Finding(f"strategy={strategy.name} names no strategy.{right}", (f"strategy.{right}=-1",))
    if strategy.tp is not None and degrees[right] is None:
        return None  # the rule ddp_over_tp reports it
    fixes = [f"strategy.{wrong}=null strategy.{right}={degrees[right] or degrees[wrong]}", f"strategy.{wrong}=null"]
    return Finding(
        f"strategy.zero_stage={strategy.zero_stage} is not supported with strategy.{wrong}={degrees[wrong]}",
        (*fixes, *(f"{line} strategy.{right}=-1" for line in fixes[1:])),
        f"use strategy.{right}",
    )


def offload(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if not strategy.offload_optimizer or (strategy.zero_stage > 0 and strategy.pp is None):
        return None
    where = "strategy.zero_stage=0" if strategy.zero_stage == 0 else f"strategy.pp={strategy.pp}"
    message = f"strategy.offload_optimizer=true is not supported with {where}"
    return Finding(message, ("strategy.offload_optimizer=false",))


def tied(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if strategy.pp is None or not plan.config.model.tie_embeddings:
        return None
    message = f"model.tie_embeddings=true is not supported with strategy={strategy.name}"
    return Finding(message, ("model.tie_embeddings=false",))


def autotp_pipeline(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if strategy.tp is None or strategy.pp is None:
        return None
    message = f"DeepSpeed's strategy.tp={strategy.tp} is not supported with strategy.pp={strategy.pp}"
    fixes = (
        "strategy.tp=null",
        "strategy.pp=null",
        "strategy.pp=null strategy.tp=-1",
        "strategy.tp=null strategy.pp=-1",
    )
    return Finding(message, fixes, "use the lab's own tp_pp")


def autotp_checkpointing(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    return None if strategy.tp is None else no_selective_recomputation(plan, f"DeepSpeed's strategy.tp={strategy.tp}")


def autotp_compile(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if strategy.tp is None or not plan.config.compile.enabled:
        return None
    message = f"compile.enabled=true is not supported with DeepSpeed's strategy.tp={strategy.tp}"
    return Finding(message, ("compile.enabled=false",))


def stage_3_compile(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if strategy.zero_stage != 3 or not plan.config.compile.enabled:
        return None
    message = "compile.enabled=true is not supported with DeepSpeed's strategy.zero_stage=3"
    return Finding(message, ("compile.enabled=false", "strategy.zero_stage=2"), "use the lab's own fsdp")


def dense(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if plan.config.model.num_experts == 0:
        return None
    message = f"model={plan.config.model.name} (a mixture of experts) is not supported with strategy={strategy.name}"
    return Finding(message, ("model.num_experts=0 model.num_shared_experts=0",), "use fsdp, or a dense model")


READ_BY_DEEPSPEED = {
    "strategy.whole_below": Condition(
        ("strategy.zero_stage",),
        lambda stage: stage == 3,
        "has no effect with strategy.zero_stage={}, which does not shard parameters",
    )
}


def nonfinite(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if plan.config.train.on_nonfinite is not OnNonfinite.skip:
        return None
    message = f"train.on_nonfinite=skip is not supported with strategy={strategy.name}"
    return Finding(message, ("train.on_nonfinite=stop",))


def only(key: str, off: object) -> Callable[[Plan], Finding | None]:
    """A check that this key, such as train.qat, has the value `off`."""
    group, name = key.split(".")

    def check(plan: Plan, strategy: DeepSpeed) -> Finding | None:
        found = getattr(getattr(plan.config, group), name)
        if found == off:
            return None
        message = f"{key}={idle.written(idle.plain(found))} is not supported with strategy={strategy.name}"
        return Finding(message, (f"{key}={idle.written(idle.plain(off))}",))

    return of_deepspeed(check)


def eight_bit(plan: Plan, strategy: DeepSpeed) -> Finding | None:
    if plan.config.optim.name is not Optimiser.adamw8bit:
        return None
    return Finding(f"optim=adamw8bit is not supported with strategy={strategy.name}", ("optim.name=adamw",))


RULES = (
    *BLOCK_RULES,
    *idle.rules(READ_BY_DEEPSPEED),
    Rule("layers_and_stages", "every stage needs a layer", too_few_layers),
    Rule(
        "ds_precision",
        "DeepSpeed keeps float32 weights and refuses float64; its tensor-parallel layers do not cast them to bf16; "
        "products in 8 bits are not proven with it",
        of_deepspeed(precision),
    ),
    Rule(
        "ds_stage", "a pipeline supports stages 0 and 1; without a pipeline, stage 0 is plain DDP", of_deepspeed(stage)
    ),
    Rule("ds_data_axis", "ZeRO shards over data ranks, and stage 0 replicates over them", of_deepspeed(data_axis)),
    Rule("ds_offload", "only ZeRO's shard of the optimiser state can be offloaded", of_deepspeed(offload)),
    Rule("ds_autotp_pipeline", "AutoTP splits a whole model, not a stage of a pipeline", of_deepspeed(autotp_pipeline)),
    Rule(
        "ds_autotp_checkpointing",
        "AutoTP reduces a product's result in place, so a result that is kept would be reduced twice",
        of_deepspeed(autotp_checkpointing),
    ),
    Rule(
        "ds_autotp_compile",
        "AutoTP reduces in place within the block, for which inductor of torch 2.11 loses gradients",
        of_deepspeed(autotp_compile),
    ),
    Rule(
        "ds_stage_3_compile",
        "a compiled block confuses the tensors into which stage 3 gathers weights: gradients were wrong on a GPU",
        of_deepspeed(stage_3_compile),
    ),
    Rule("ds_nonfinite", "DeepSpeed updates the weights before the norm is known", of_deepspeed(nonfinite)),
    Rule("ds_keep_zeros", "DeepSpeed clips and updates with gradients of its own", only("train.keep_zeros", False)),
    Rule("ds_qat", "rounding is proven in float64 only, which DeepSpeed refuses", only("train.qat", Qat.none)),
    Rule("ds_loss_chunks", "a loss in chunks is not proven with DeepSpeed's engines", only("train.loss_chunks", 1)),
    Rule(
        "ds_activations",
        "offloaded inputs of layers are not proven with its engines",
        only("train.offload_activations", False),
    ),
    Rule("ds_teacher", "DeepSpeed's engines run one model", only("train.teacher", None)),
    Rule("ds_eight_bit", "DeepSpeed cuts moments into flat parts of its own", of_deepspeed(eight_bit)),
    Rule("ds_dense", "DeepSpeed's step does not run the lab's balancing of experts", of_deepspeed(dense)),
    Rule("ds_tied", "the layers of DeepSpeed's pipeline share no weights", of_deepspeed(tied)),
)
