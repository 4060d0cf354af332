"""Rules of pipelines: stages, schedules, microbatches."""

from __future__ import annotations

from train.plan import Plan
from train.rules.base import Finding, Rule, degree_fixes
from train.strategies.pipeline import SCHEDULES, Pipeline


def schedule(plan: Plan) -> Finding | None:
    name = plan.option("schedule", None)
    if name is None or name in SCHEDULES:
        return None
    return Finding(f"strategy.schedule={name} is not known", tuple(f"strategy.schedule={s}" for s in SCHEDULES))


def layers_and_stages(plan: Plan) -> Finding | None:
    layers, stages = plan.config.model.num_layers, plan.degrees["pp"]
    if layers >= stages:
        return None
    message = f"model.num_layers={layers} is fewer than strategy.pp={stages} stages"
    return Finding(message, (f"model.num_layers={stages}", *degree_fixes(plan, "pp", list(range(layers, 0, -1)))))


def microbatches_and_stages(plan: Plan) -> Finding | None:
    stages, train = plan.degrees["pp"], plan.config.train
    if not isinstance(plan.config.strategy, Pipeline) or not 0 < plan.num_microbatches < stages:
        return None
    unit = train.micro_batch_size * plan.data_ranks
    fixes = [f"train.global_batch_size={unit * stages}"]
    if train.global_batch_size % (plan.data_ranks * stages) == 0:
        fixes.append(f"train.micro_batch_size={train.global_batch_size // (plan.data_ranks * stages)}")
    return Finding(
        f"train.global_batch_size={train.global_batch_size} gives {plan.num_microbatches} microbatches of "
        f"train.micro_batch_size={train.micro_batch_size}, fewer than strategy.pp={stages} stages",
        tuple(fixes),
        "use a larger train.global_batch_size",
    )


def tied_over_stages(plan: Plan) -> Finding | None:
    stages = plan.degrees["pp"]
    if not plan.config.model.tie_embeddings or stages == 1 or not isinstance(plan.config.strategy, Pipeline):
        return None
    message = f"model.tie_embeddings=true shares a weight between the first and the last of strategy.pp={stages} stages"
    return Finding(message, ("model.tie_embeddings=false",))


RULES = (
    Rule("schedule", "a schedule is one of torch's", schedule),
    Rule("layers_and_stages", "every stage has a layer", layers_and_stages),
    Rule("microbatches_and_stages", "1F1B fills every stage before it drains one", microbatches_and_stages),
    Rule("tied_over_stages", "stages share no weights", tied_over_stages),
)
