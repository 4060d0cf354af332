"""The peak memory of the fullest rank by kind, in closed form. Torch is not imported (docs/planner-memory.md).

    parameters, gradients, optimiser   what a rank keeps (`strategies.memory.state_bytes`); under DDP also the gradients
                                       of a rank before they are put into buckets
    unsharded     what FSDP gathers, and gradients before their reduction
    activations   from a forward to its backward: the layers' tensors, by the mode of recomputation
    logits        of the head and the loss, forward and backward
    temporary     of a backward: gradients on their way, and what is recomputed
    pipeline      what a schedule receives into
    buffers       the batch and the rotary table

The step is replayed by the sizes of its tensors (`memory/`): one layer forward and backward, the ends, and the order of
a rank's microbatches. It is that of eager code on a CUDA device; what the compiler fuses is left out under compile.enabled. `reserve` is what a device holds beside tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from launch.planning.job import Job
from launch.planning.memory.deepspeed import of_deepspeed
from launch.planning.memory.schedule import moments
from launch.planning.memory.stages import Kinds, Stage, plus, stage_of
from train.config.plan import Plan
from train.config.technique import Rank
from train.strategies.data.keys import FsdpKeys
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.memory import state_bytes
from train.strategies.techniques import rank_of

TOKEN = 8  # bytes of a token's number


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind on one rank, at the peak of a step. `rank`: its number."""

    kinds: Mapping[str, float] = field(default_factory=dict)
    rank: int = 0

    @property
    def total(self) -> float:
        return sum(self.kinds.values())


def footprint(job: Job) -> Footprint:
    """The footprint of the rank that needs the most."""
    return max((of_rank(job, rank) for rank in candidates(job.plan)), key=lambda one: one.total)


def candidates(plan: Plan) -> list[int]:
    """One rank of each place in the pipeline, the first along every other axis: it has the largest chunks."""
    ranks = plan.world_size // plan.degrees["pp"]
    return [place * ranks for place in range(plan.degrees["pp"])]


def of_rank(job: Job, rank: int) -> Footprint:
    plan = job.plan
    if isinstance(plan.config.strategy, DeepSpeed):
        return Footprint(of_deepspeed(plan, rank), rank)
    here = rank_of(plan, rank)
    own = plan.config.strategy.stages_of(here.place["pp"], plan.degrees["pp"])
    stages = {number: stage_of(here, number) for number in own}
    held = between_steps(plan, here, rank, stages)
    peaks = [plus(held, moment) for moment in (*moments(plan, here, stages, held["gradients"]), {})]
    worst = max(peaks, key=lambda kinds: sum(kinds.values()))
    return Footprint({kind: size for kind, size in worst.items() if size > 0}, rank)


def between_steps(plan: Plan, here: Rank, rank: int, stages: Mapping[int, Stage]) -> Kinds:
    """What the rank holds in every moment of a step. Gradients are counted by the moments."""
    state = {kind: float(size) for kind, size in state_bytes(plan, rank).items()}
    strategy, train = plan.config.strategy, plan.config.train
    if isinstance(strategy, FsdpKeys) and strategy.cpu_offload:
        state = dict.fromkeys(state, 0.0)
    rows = train.global_batch_size // plan.data_ranks
    head_dim = plan.config.model.dim // plan.config.model.num_heads
    any_stage = next(iter(stages.values()))
    rope = plan.config.model.max_seq_len * head_dim * any_stage.sizes.wide * len(stages)
    received = sum(plan.num_microbatches * one.sizes.shard * (one.before + one.after) for one in stages.values())
    return state | {"pipeline": received, "buffers": 2.0 * rows * train.seq_len * TOKEN + rope}
