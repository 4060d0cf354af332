"""The memory of DeepSpeed's engines: their state by ZeRO's arithmetic, and the activations of the same model."""

from __future__ import annotations

from launch.planning.memory.stages import Kinds, plus, stage_of
from train.config.plan import Plan
from train.strategies.memory import needs
from train.strategies.techniques import rank_of


def of_deepspeed(plan: Plan, rank: int) -> Kinds:
    """A pipeline runs 1F1B, so a stage has as many microbatches on their way as there are stages from it on."""
    state, here = needs(plan, rank), rank_of(plan, rank)
    place, ranks = here.place["pp"], plan.degrees["pp"]
    kinds = {name: float(getattr(state, name)) for name in ("parameters", "gradients", "optimiser", "unsharded")}
    kinds = {name: 0.0 if name in state.on_host else size for name, size in kinds.items()}
    stage = stage_of(here, place)
    waiting = min(ranks - place, max(plan.num_microbatches, 1)) - 1
    others = {kind: waiting * size for kind, size in stage.kept.items()}
    moments = [*stage.forward(fresh=True), *stage.backward(first=False), {}]
    return plus(kinds, others, max(moments, key=lambda moment: sum(moment.values())))
