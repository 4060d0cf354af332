"""The peak memory of the fullest rank by kind, in closed form. Torch is not imported (docs/planner-memory.md).

    parameters, gradients, optimiser   what a rank keeps; under DDP also gradients that are not in a bucket yet
    unsharded     what FSDP gathers, and gradients before their reduction
    activations   from a forward to its backward: the layers' tensors, by the mode of recomputation
    logits        of the head and the loss, forward and backward
    temporary     of a backward: gradients on their way, and what is recomputed
    pipeline      what a schedule receives into
    buffers       the batch and the rotary table

The step is replayed by the sizes of its tensors (`memory/`): one layer forward and backward, the ends, and the order
of a rank's microbatches. It is that of eager code on a CUDA device; under compile.enabled, what the compiler fuses is
left out. `reserve` is what a device holds beside these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TypeVar

from train.command.planning import constants
from train.command.planning.job import Job
from train.command.planning.memory.schedule import moments
from train.command.planning.memory.stages import Engine, as_here, plus, stage_of
from train.command.planning.memory.state import between_steps
from train.command.planning.memory.tape import Kinds
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.config.technique import Rank
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.memory import GiB, needs
from train.strategies.techniques import rank_of

One = TypeVar("One")
FEW = 4  # places of a pipeline that are all looked at


@dataclass(frozen=True)
class Footprint:
    """Bytes by kind on the rank with this number, at the peak of a step."""

    kinds: Mapping[str, float] = field(default_factory=dict)
    rank: int = 0

    @property
    def total(self) -> float:
        return total(self.kinds)


def total(kinds: Mapping[str, float]) -> float:
    return sum(kinds.values())


def footprint(job: Job, seen: dict[int, Rank] | None = None, enough: float = math.inf) -> Footprint:
    """The footprint of the rank that needs the most; or of one that needs `enough` bytes, at the first moment that is
    found, which need not be its peak.
    `seen`: ranks by number, of plans that split parameters in the same way, whose parts are not computed again; those
    of this plan are added."""
    found = (of_rank(job, rank, seen=seen, enough=enough) for rank in candidates(job.plan))
    return largest(found, lambda one: one.total, enough)


def largest(found: Iterable[One], size: Callable[[One], float], enough: float) -> One:
    """The largest, or the first that is as large as `enough`."""
    best: tuple[float, One] | None = None
    for one in found:
        new = size(one)
        if best is None or new > best[0]:
            best = new, one
            if new >= enough:
                break
    assert best is not None
    return best[1]


def candidates(plan: Plan) -> list[int]:
    """Ranks of which one needs the most: the first along an axis, as it has the largest chunks, but the second of `cp`
    where results of attention are kept, as it has one more; and of `pp` the ends, their neighbours, and those with more
    layers than these."""
    strategy, ranks = plan.config.strategy, plan.degrees["pp"]
    held = [
        sum(len(plan.layers_of_stages[stage]) for stage in strategy.stages_of(place, ranks)) for place in range(ranks)
    ]
    ends = {0, 1, ranks - 2, ranks - 1} if ranks > FEW else {*range(ranks)}
    most = max((held[place] for place in ends if place not in (0, ranks - 1)), default=0)
    places = ends | {place for place in range(1, ranks - 1) if held[place] > most}
    selective = plan.config.train.activation_checkpointing is ActivationCheckpointing.selective
    second = plan.degrees["tp"] if plan.degrees["cp"] > 1 and selective else 0
    return [place * (plan.world_size // ranks) + second for place in sorted(places)]


def of_rank(
    job: Job, rank: int, engine: Engine = as_here, *, seen: dict[int, Rank] | None = None, enough: float = math.inf
) -> Footprint:
    if isinstance(job.plan.config.strategy, DeepSpeed):
        return Footprint(of_deepspeed(job.plan, rank), rank)
    found = moments_of(job, rank, engine, seen=seen)
    return Footprint(largest(found, total, enough), rank)


def moments_of(
    job: Job, rank: int, engine: Engine = as_here, *, seen: dict[int, Rank] | None = None
) -> Iterator[Kinds]:
    """Bytes by kind that the rank holds at each moment of a step that may be the peak; not for DeepSpeed."""
    strategy, here = job.plan.config.strategy, rank_of(job.plan, rank, seen.get(rank) if seen else None)
    if seen is not None:
        seen[rank] = here
    own = strategy.stages_of(here.place["pp"], job.plan.degrees["pp"])
    stages = {number: stage_of(here, number, engine) for number in own}
    held = between_steps(here, stages)
    for moment in moments(here, stages, held):
        yield {kind: size for kind, size in moment.items() if size > 0}


def of_deepspeed(plan: Plan, rank: int) -> Kinds:
    """DeepSpeed's state by ZeRO's arithmetic, and the activations of the same model. A pipeline runs 1F1B, so a stage
    has as many microbatches on their way as there are stages from it on."""
    state, here = needs(plan, rank), rank_of(plan, rank)
    place, ranks = here.place["pp"], plan.degrees["pp"]
    kinds = {name: float(getattr(state, name)) for name in ("parameters", "gradients", "optimiser", "unsharded")}
    kinds = {name: 0.0 if name in state.on_host else size for name, size in kinds.items()}
    stage = stage_of(here, place)
    waiting = min(ranks - place, max(plan.num_microbatches, 1)) - 1
    others = {kind: waiting * size for kind, size in stage.kept.items()}
    found = [*stage.forward(fresh=True), *stage.backward(first=False, last=False, stayed=False), {}]
    return plus(kinds, others, max(found, key=total))


def reserve(job: Job) -> float:
    """Bytes of a device that must stay free beside the footprint: for the context, for the communicators of the axes
    that have several ranks, and for what the allocator cannot use. 0 if the device's memory is not known."""
    size = job.plan.config.hardware.memory_gib
    if size is None:
        return 0.0
    return outside(job) + constant("fragmentation") * size * GiB


def outside(job: Job) -> float:
    """Bytes that a device holds outside the allocator: the context and the communicators."""
    groups = sum(degree > 1 for degree in job.plan.degrees.values())
    return (constant("context_gib") + groups * constant("communicator_gib")) * GiB


def constant(name: str) -> float:
    return _constants()[name]


@cache
def _constants() -> dict[str, float]:
    return {name: float(entry["value"]) for name, entry in constants.stored().items()}
