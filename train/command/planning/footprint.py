"""The memory of the fullest rank at its peak, by kind. A stand-in until the closed form of the memory model is here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from train.command.planning.job import Job
from train.config.schema import ActivationCheckpointing
from train.config.shapes import element_sizes
from train.config.traffic import tokens_of
from train.strategies.memory import GiB, needs


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind."""

    kinds: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def footprint(job: Job) -> Footprint:
    plan = job.plan
    per_stage, pp = plan.world_size // plan.degrees["pp"], plan.degrees["pp"]
    return max((_of_rank(job, place * per_stage, place) for place in {0, pp - 1}), key=lambda one: one.total)


def _of_rank(job: Job, rank: int, place: int) -> Footprint:
    plan = job.plan
    model, strategy, kind = plan.config.model, plan.config.strategy, plan.config.train.activation_checkpointing
    held = needs(plan, rank)
    _, used = element_sizes(plan.config.precision)
    tokens, tp, pp = tokens_of(plan), plan.degrees["tp"], plan.degrees["pp"]
    width = {"none": 18 * model.dim + 4 * model.ffn_dim, "selective": 12 * model.dim + 3 * model.ffn_dim,
             "full": model.dim * tp}[kind.value]  # fmt: skip
    stages = strategy.stages_of(place, pp)
    layers = sum(len(plan.layers_of_stages[stage]) for stage in stages)
    alive = 1 if pp == 1 else plan.num_microbatches if strategy.schedule_name() in ("gpipe", "looped_bfs") else min(
        plan.num_microbatches, pp - place + (pp if len(stages) > 1 else 0))  # fmt: skip
    kept = tokens * width * used / 2 * layers * alive / tp
    if kind is not ActivationCheckpointing.none:
        kept += tokens * (18 * model.dim + 4 * model.ffn_dim) * used / 2 / tp
    logits = 10 * tokens * model.vocab_size / tp if plan.num_stages - 1 in stages else 0.0
    return Footprint(
        {
            "parameters": held.parameters,
            "gradients": held.gradients,
            "optimiser": held.optimiser,
            "gathered": held.unsharded,
            "activations": kept,
            "logits": logits,
        }
    )


def reserve(job: Job) -> float:
    """Bytes that stay free for the context, NCCL and fragmentation."""
    size = job.plan.config.hardware.memory_gib
    return 0.0 if size is None else min(0.1 * size, 6.0) * GiB
