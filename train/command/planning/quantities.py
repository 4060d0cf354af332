"""What a job computes, sends and updates in a step, as numbers that no constant of the cost model changes.

They come from the same closed forms as `launch.explain` and the proof: shapes, who holds what, and expected traffic.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

from train.command.planning import products
from train.command.planning.job import Job
from train.command.planning.links import Group, group_of
from train.command.planning.products import TILE, Matrix, Products, Work
from train.command.planning.profile import Profile, profile_of
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.config.technique import Rank
from train.config.traffic import Traffic, totals
from train.strategies.context.keys import ContextKeys
from train.strategies.equal_ranks import sending_key
from train.strategies.memory import state_bytes
from train.strategies.scalars import scalars
from train.strategies.techniques import rank_of
from train.strategies.traffic import of_techniques, sent

OF_DATA = ("FSDP", "DDP")


@dataclass(frozen=True, slots=True)
class Message:
    """The calls of one operation of a rank in a step. `of_data`: for data parallelism, whose messages may share the
    axis `cp` with those of attention. `per_step`: they come once a step, not with every microbatch."""

    axis: str
    op: str
    calls: int
    bytes: int
    group: Group
    of_data: bool = False
    per_step: bool = False


Messages = tuple[Message, ...]


@dataclass(frozen=True)
class Stage:
    """A rank of `pp`: its layers, whether it computes the head, and what it sends in a step."""

    layers: int
    has_head: bool
    messages: Messages
    updated_bytes: int  # parameters that it updates


@dataclass(frozen=True)
class Quantities:
    job: Job
    work: Work
    head: tuple[Products, Products, float]
    kinds: tuple[Stage, ...]
    places: tuple[int, ...]  # for each rank of pp, which of `kinds` it is
    microbatches: int
    chunks: int
    tile_elements: float  # the results that all processors of a device compute at a time
    units: int  # modules that FSDP gathers, of the largest stage; 0 without FSDP of more than one rank
    head_matrix: Matrix
    profile: Profile | None  # what was measured on the device


def quantities(job: Job) -> Quantities:
    plan = job.plan
    ranks_per_stage = plan.world_size // plan.degrees["pp"]
    known: dict[Hashable, int] = {}
    kinds: list[Stage] = []
    places: list[int] = []
    for place in range(plan.degrees["pp"]):
        key = sending_key(plan, place)
        if key not in known:
            known[key] = len(kinds)
            kinds.append(_stage(job, place * ranks_per_stage))
        places.append(known[key])
    return assembled(job, computed_of(plan), tuple(kinds), tuple(places), profile_of_job(job))


@dataclass(frozen=True)
class Computed:
    """What a layer and the head compute for a microbatch; `head`: forward, backward and the bytes of the loss."""

    layer: Work
    head: tuple[Products, Products, float]
    head_matrix: Matrix


def computed_of(plan: Plan) -> Computed:
    first, last = rank_of(plan, 0), rank_of(plan, plan.world_size - 1)
    return Computed(products.layer(first), products.head(last), products.head_matrix(last))


def profile_of_job(job: Job) -> Profile | None:
    return profile_of(job.plan.config.hardware, job.products, job.plan.config.compile.enabled)


def assembled(
    job: Job, computed: Computed, kinds: tuple[Stage, ...], places: tuple[int, ...], profile: Profile | None
) -> Quantities:
    processors = job.plan.config.hardware.processors
    assert processors is not None or profile is not None, "job.missing_figures names it"
    return Quantities(
        job,
        computed.layer,
        computed.head,
        kinds,
        places,
        job.plan.num_microbatches,
        job.stages_per_rank,
        float(TILE * (processors or 1)),
        max(stage.layers for stage in kinds) if _gathers(job.plan) else 0,
        computed.head_matrix,
        profile,
    )


def tokens_per_step(plan: Plan) -> int:
    return plan.config.train.global_batch_size * plan.config.train.seq_len


def recomputation(plan: Plan) -> ActivationCheckpointing:
    return plan.config.train.activation_checkpointing


def passes_round(plan: Plan) -> bool:
    """Whether keys and values pass round a ring while attention computes."""
    strategy = plan.config.strategy
    return isinstance(strategy, ContextKeys) and strategy.cp_method == "ring"


def shards_of(plan: Plan) -> int:
    """The number of ranks over which FSDP shards parameters."""
    return plan.degrees["dp_shard"] * plan.degrees["cp"]


def is_gathered(plan: Plan) -> bool:
    """Whether FSDP shards parameters over several ranks."""
    return plan.config.strategy.uses_fsdp() and shards_of(plan) > 1


def _gathers(plan: Plan) -> bool:
    """Whether FSDP gathers or reduces with every microbatch."""
    return is_gathered(plan) and not plan.config.strategy.reduces_once()


def _stage(job: Job, rank: int) -> Stage:
    plan = job.plan
    here = rank_of(plan, rank)
    messages = summed(sent_for_model(job, here), sent_for_data(job, here))
    return Stage(*layers_of_rank(plan, here.place["pp"]), messages, state_bytes(plan, rank)["parameters"])


def layers_of_rank(plan: Plan, place: int) -> tuple[int, bool]:
    """(The number of layers of a rank of `pp`, whether it has the head)."""
    held = plan.config.strategy.stages_of(place, plan.degrees["pp"])
    return sum(len(plan.layers_of_stages[stage]) for stage in held), plan.num_stages - 1 in held


def messages_of(job: Job, rows: Iterable[Traffic], *, of_data: bool = False) -> Messages:
    """The rows of a rank's traffic by axis and operation. `of_data`: they are FSDP's or DDP's, over whatever axis."""
    plan, found = job.plan, []
    for (axis, op), total in totals(rows).items():
        group, size, calls = group_of(plan, axis), total.bytes, total.calls
        if op == "send":
            size, calls = size * job.chunks, calls * job.chunks
            if job.sends_parts and not plan.config.strategy.shards_sequence():
                size //= plan.degrees["tp"]
        own = of_data or axis.startswith("dp_")
        found.append(Message(axis, op, calls, size, group, own, own and _once(plan)))
    return tuple(found)


def sent_for_model(job: Job, here: Rank) -> Messages:
    """What a rank sends apart from data parallelism."""
    others = [one for one in here.techniques if one.name not in OF_DATA]
    return messages_of(job, sent(here, of_techniques(here, others)))


def sent_for_data(job: Job, here: Rank) -> Messages:
    """What a rank sends by FSDP or DDP, and as single numbers."""
    own = [one for one in here.techniques if one.name in OF_DATA]
    numbers = messages_of(job, sent(here, scalars(here)))
    return summed(messages_of(job, sent(here, of_techniques(here, own)), of_data=True), numbers)


def by_name(messages: Messages) -> dict[tuple[str, str, bool], Message]:
    return {(one.axis, one.op, one.of_data): one for one in messages}


def summed(some: Messages, others: Messages) -> Messages:
    """Messages of the same axis, operation and purpose added up."""
    found = by_name(some)
    for name, one in by_name(others).items():
        old = found.get(name)
        both = one if old is None else replace(old, calls=old.calls + one.calls, bytes=old.bytes + one.bytes)
        found[name] = both
    return tuple(found.values())


def _once(plan: Plan) -> bool:
    """Whether gradients are reduced once a step."""
    strategy = plan.config.strategy
    return strategy.uses_ddp() or strategy.reduces_once()
