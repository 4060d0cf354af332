"""The rules of pipelines: stages, schedules and microbatches."""

from __future__ import annotations

import difflib

from train.config.plan import Plan
from train.config.rule import Finding, Rule, below, degree_fixes, divisors, nearest
from train.strategies.pipeline.keys import PipelineKeys
from train.strategies.pipeline.placement import SCHEDULES, ScheduleFacts, layers_per_stage

MAX_LISTED = 64  # the most stages whose layers a fix lists


def facts_of(plan: Plan) -> ScheduleFacts | None:
    """The facts of the schedule; None if the schedule is not known."""
    return SCHEDULES.get(plan.keys(PipelineKeys).schedule)


def scheduled(plan: Plan) -> str:
    return f"strategy.schedule={plan.keys(PipelineKeys).schedule}"


def schedules(*names: str) -> tuple[str, ...]:
    """Lines that change the schedule, alone or with the default number of stages per rank."""
    lines = [f"strategy.schedule={name}" for name in names]
    return (*lines, *(f"{line} strategy.stages_per_rank=null" for line in lines))


def schedule(plan: Plan) -> Finding | None:
    name = plan.keys(PipelineKeys).schedule
    if name in SCHEDULES:
        return None
    nearest_first = difflib.get_close_matches(name, SCHEDULES, n=len(SCHEDULES), cutoff=0)
    return Finding(f"strategy.schedule={name} is none of {', '.join(SCHEDULES)}", schedules(*nearest_first))


def pipeline_axis(plan: Plan) -> Finding | None:
    if "pp" in plan.axes:
        return None
    return Finding("strategy.pp=null, but the strategy is a pipeline", ("strategy.pp=1", "strategy.pp=-1"))


def stages_per_rank(plan: Plan) -> Finding | None:
    facts, keys = facts_of(plan), plan.keys(PipelineKeys)
    if facts is None:
        return None
    chunks = keys.num_chunks()
    if facts.least <= chunks <= (facts.most or chunks):
        return None
    needs = f"exactly {facts.least}" if facts.most == facts.least else f"at least {facts.least}"
    others = [name for name, other in SCHEDULES.items() if other.least <= chunks <= (other.most or chunks)]
    return Finding(
        f"strategy.stages_per_rank={chunks}, but strategy.schedule={plan.keys(PipelineKeys).schedule} needs {needs}",
        (
            "strategy.stages_per_rank=null",
            "strategy.stages_per_rank=null strategy.layers_per_stage=[]",
            *(f"strategy.schedule={name}" for name in others),
        ),
        f"use {facts.least} stages per rank and a model.num_layers that fits",
    )


def layers_and_stages(plan: Plan) -> Finding | None:
    keys = plan.keys(PipelineKeys)
    if keys.layers_per_stage:
        return None
    alone = ("strategy.stages_per_rank=null",) if keys.stages_per_rank else ()
    return too_few_layers(plan, *alone, *(schedules("1f1b", "gpipe") if facts_of(plan) else ()))


def too_few_layers(plan: Plan, *fixes: str) -> Finding | None:
    """The check of any pipeline. `fixes`: more lines to try, besides other degrees and more layers."""
    layers, stages = plan.config.model.num_layers, plan.num_stages
    if layers >= stages:
        return None
    chunks = stages // plan.degrees["pp"]
    shown = f"strategy.pp={plan.degrees['pp']}" + (f" x {chunks} stages per rank" if chunks > 1 else " stages")
    fewer = [layers // chunks, *below(layers // chunks)] if layers >= chunks else []
    return Finding(
        f"model.num_layers={layers} is fewer than {shown}",
        (f"model.num_layers={stages}", *degree_fixes(plan, "pp", fewer), *fixes),
    )


def given_layers(plan: Plan) -> Finding | None:
    given, layers, stages = plan.keys(PipelineKeys).layers_per_stage, plan.config.model.num_layers, plan.num_stages
    if not given or (len(given) == stages and sum(given) == layers and min(given) >= 1):
        return None
    shown = str(list(given)).replace(" ", "")
    if len(given) != stages:
        message = f"strategy.layers_per_stage={shown} has {len(given)} entries, but there are {stages} stages"
    elif min(given) < 1:
        message = f"strategy.layers_per_stage={shown} leaves a stage without a layer"
    else:
        message = f"strategy.layers_per_stage={shown} adds up to {sum(given)}, not model.num_layers={layers}"
    fixes = [f"model.num_layers={sum(given)}"] if len(given) == stages and min(given) >= 1 else []
    if stages <= layers and stages <= MAX_LISTED:
        balanced = layers_per_stage(plan.config.model, plan.config.train.seq_len, stages)
        fixes.append("strategy.layers_per_stage=" + str(balanced).replace(" ", ""))
    return Finding(
        message, (*fixes, "strategy.layers_per_stage=[]", f"strategy.layers_per_stage=[] model.num_layers={stages}")
    )


def microbatches(plan: Plan) -> Finding | None:
    facts, m, p, train = facts_of(plan), plan.num_microbatches, plan.degrees["pp"], plan.config.train
    if facts is None or m == 0 or facts.accepts(m, p, plan.num_stages):
        return None
    name = plan.keys(PipelineKeys).schedule
    if facts.microbatches == "stages":
        rule, wanted = f"fewer than its {plan.num_stages} stages", [plan.num_stages]
    else:
        rule = f"which do not make {m // p} equal rounds over strategy.pp={p}"
        rounds = m // p
        near = {(m // rounds + i) * rounds for i in (0, 1)} | {(rounds + i) * p for i in (-1, 0, 1)}
        wanted = nearest([k for k in near if k > 0 and facts.accepts(k, p, plan.num_stages)], m)
    per_rank = train.global_batch_size // plan.data_ranks
    fixes = [f"train.global_batch_size={train.micro_batch_size * plan.data_ranks * k}" for k in wanted[:4]]
    whole = [k for k in divisors(per_rank) if facts.accepts(k, p, plan.num_stages)]
    fixes += [f"train.micro_batch_size={per_rank // k}" for k in nearest(whole, m)[:4]]
    fixes += schedules("1f1b", "gpipe", "looped_bfs")
    return Finding(
        f"train.global_batch_size={train.global_batch_size} gives {m} microbatches of train.micro_batch_size="
        f"{train.micro_batch_size}, {rule} (strategy.schedule={name})",
        tuple(fixes),
        "use a larger train.global_batch_size",
    )


def split_and_compile(plan: Plan) -> Finding | None:
    facts = facts_of(plan)
    if facts is None or not facts.splits_backward or not plan.config.compile.enabled:
        return None
    message = f"compile.enabled=true is not supported with {scheduled(plan)}"
    return Finding(message, ("compile.enabled=false", *schedules("interleaved_1f1b", "looped_bfs", "1f1b")))


def split_and_ddp(plan: Plan) -> Finding | None:
    facts, degree = facts_of(plan), plan.axes.get("dp_replicate")
    if facts is None or not facts.splits_backward or degree is None or "dp_shard" in plan.axes:
        return None
    message = f"strategy.dp_replicate={degree} (DDP) is not supported with {scheduled(plan)}"
    fixes = (f"strategy.dp_replicate=null strategy.dp_shard={degree}", *schedules("interleaved_1f1b", "looped_bfs"))
    return Finding(message, fixes)


def split_and_reshard(plan: Plan) -> Finding | None:
    facts = facts_of(plan)
    if facts is None or facts.least == 1 or not plan.config.strategy.frees_parameters():
        return None
    message = f"strategy.reshard_after_forward=true is not supported with {scheduled(plan)}"
    return Finding(message, ("strategy.reshard_after_forward=false", *schedules("1f1b", "gpipe")))


RULES = (
    Rule("schedule", "a schedule must be one of torch's", schedule),
    Rule("pipeline_axis", "a pipeline must name its axis, at degree 1 too", pipeline_axis),
    Rule("stages_per_rank", "a schedule supports certain numbers of stages per rank only", stages_per_rank),
    Rule("layers_and_stages", "every stage needs a layer", layers_and_stages),
    Rule("layers_per_stage", "the stages must have every layer once", given_layers),
    Rule("microbatches_and_stages", "a schedule supports certain numbers of microbatches only", microbatches),
    Rule("split_backward_compiled", "a compiled graph computes both halves of a backward at once", split_and_compile),
    Rule("split_backward_ddp", "DDP's hooks run after a whole backward only, not after a half of it", split_and_ddp),
    Rule("resharded_stages", "the schedule decides when a rank with several stages gathers them", split_and_reshard),
)
