"""The quantities of many layouts of one search. What several of them share is computed once.

Everything comes from the same closed forms as the quantities of a single job (`planning.quantities`). They are asked
about small plans with the same mesh, and what a rank sends follows for any number of layers n, of microbatches m and of
sequences u in each, because it has the form

    (a + b n) + (c + d n) m + (e + f n) m u

Two numbers of layers and three pairs (m, u) give the six factors. With fewer than four microbatches some techniques
send otherwise, so those are asked about themselves. DDP's buckets do not grow evenly with the layers: it is not here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property

from train.command.planning.job import Job, of_plan
from train.command.planning.profile import Profile
from train.command.planning.quantities import (
    Computed,
    Message,
    Quantities,
    Stage,
    assembled,
    computed_of,
    layers_of_rank,
    messages_of,
    profile_of_job,
    quantities,
)
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing, Config
from train.strategies.equal_ranks import sending_key
from train.strategies.memory import needs, state_bytes
from train.strategies.pipeline.keys import PipelineKeys
from train.strategies.pipeline.placement import layers_per_stage

FEW = 4  # microbatches from which on everything is a sum of terms as above
PROBES = ((2, 1), (3, 1), (2, 2))  # (microbatches, sequences in each)

Key = Hashable
Sent = tuple[Message, ...]


@dataclass(frozen=True)
class Small:
    """A plan with the mesh and the strategy of a layout, and few layers, microbatches and sequences."""

    job: Job

    def with_layers(self, each: int, microbatches: int, sequences: int) -> Job:
        """`each`: the layers of every stage."""
        plan = self.job.plan
        strategy, stages = plan.config.strategy, plan.num_stages
        if isinstance(strategy, PipelineKeys):
            strategy = replace(strategy, layers_per_stage=[each] * stages)
        config = replace(
            plan.config,
            strategy=strategy,
            model=replace(plan.config.model, num_layers=each * stages),
            train=replace(
                plan.config.train,
                micro_batch_size=sequences,
                global_batch_size=sequences * microbatches * plan.data_ranks,
            ),
        )
        return replace(self.job, plan=Plan(config, plan.world_size))


@dataclass
class Mesh:
    """What all layouts of a mesh share that differ only in microbatches, kind of recomputation, layers of stages, and
    schedule of the same placement. `classes`: a rank of `pp` of each kind; `places`: the class of each rank of `pp`."""

    small: Small
    classes: tuple[int, ...]
    places: tuple[int, ...]
    sent: dict[tuple[int, int, int, int], Sent] = field(default_factory=dict)
    grown: dict[tuple[int, int, int, int], Sent] = field(default_factory=dict)

    def messages(self, kind: int, layers: int, microbatches: int, sequences: int) -> Sent:
        """Of a rank of this class with so many layers."""
        if microbatches < FEW:
            return self._of_layers(kind, layers, microbatches, sequences)
        one, more, larger = (self._of_layers(kind, layers, *probe) for probe in PROBES)
        return tuple(
            replace(
                first,
                calls=_extended(first.calls, second.calls, third.calls, microbatches, sequences),
                bytes=_extended(first.bytes, second.bytes, third.bytes, microbatches, sequences),
            )
            for first, second, third in zip(one, more, larger, strict=True)
        )

    def _of_layers(self, kind: int, layers: int, microbatches: int, sequences: int) -> Sent:
        chunks, key = self.small.job.stages_per_rank, (kind, layers, microbatches, sequences)
        if key not in self.grown:
            few, more = (self._probe(kind, each, microbatches, sequences) for each in (1, 2))
            self.grown[key] = tuple(
                replace(
                    first,
                    calls=first.calls + (layers - chunks) * (second.calls - first.calls) // chunks,
                    bytes=first.bytes + (layers - chunks) * (second.bytes - first.bytes) // chunks,
                )
                for first, second in zip(few, more, strict=True)
            )
        return self.grown[key]

    def _probe(self, kind: int, each: int, microbatches: int, sequences: int) -> Sent:
        key = (kind, each, microbatches, sequences)
        if key not in self.sent:
            job = self.small.with_layers(each, microbatches, sequences)
            self.sent[key] = messages_of(job, self._rank(kind))
        return self.sent[key]

    def parameters(self, kind: int, layers: int) -> int:
        """The bytes of the parameters that a rank of this class updates."""
        few, more = self._parameters[kind]
        chunks = self.small.job.stages_per_rank
        return few + (layers - chunks) * (more - few) // chunks

    @cached_property
    def _parameters(self) -> list[list[int]]:
        plans = [self.small.with_layers(each, 2, 1).plan for each in (1, 2)]
        ranks = map(self._rank, range(len(self.classes)))
        return [[state_bytes(plan, rank)["parameters"] for plan in plans] for rank in ranks]

    def floor(self, kind: int, layers: int) -> float:
        """Bytes that a rank of this class cannot do without: its state and what FSDP gathers, without activations."""
        few, more = self._floors[kind]
        chunks = self.small.job.stages_per_rank
        return few + (layers - 2 * chunks) * (more - few) / chunks

    @cached_property
    def _floors(self) -> list[list[int]]:
        plans = [self.small.with_layers(each, 1, 1).plan for each in (2, 3)]
        return [[needs(plan, rank).on_device for plan in plans] for rank in map(self._rank, range(len(self.classes)))]

    def _rank(self, kind: int) -> int:
        plan = self.small.job.plan
        return self.classes[kind] * (plan.world_size // plan.degrees["pp"])


def _extended(first: int, more: int, larger: int, microbatches: int, sequences: int) -> int:
    """From the values of PROBES: a + b m + c m u."""
    c = (larger - first) // 2
    b = more - first - c
    return first - 2 * (b + c) + b * microbatches + c * microbatches * sequences


@dataclass
class Tables:
    """The tables of one search: one model, batch, world and hardware."""

    computed: dict[Key, Computed] = field(default_factory=dict)
    profiles: dict[str, Profile | None] = field(default_factory=dict)
    shapes: dict[Key, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    balanced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    degrees: Key = None  # of the mesh whose layouts are priced now, one after the other
    meshes: dict[Key, Mesh] = field(default_factory=dict)  # of these degrees

    def quantities(self, job: Job) -> Quantities:
        """As `planning.quantities`, for a job whose stages' layers are listed (`listed`)."""
        plan = job.plan
        if plan.config.strategy.uses_ddp():
            return quantities(job)
        mesh = self.mesh_of(job)
        kinds: dict[tuple[int, int], int] = {}
        stages: list[Stage] = []
        places: list[int] = []
        for place, kind in enumerate(mesh.places):
            layers, has_head = layers_of_rank(plan, place)
            if (kind, layers) not in kinds:
                kinds[kind, layers] = len(stages)
                sent = mesh.messages(kind, layers, plan.num_microbatches, plan.config.train.micro_batch_size)
                stages.append(Stage(layers, has_head, sent, mesh.parameters(kind, layers)))
            places.append(kinds[kind, layers])
        return self._assembled(job, tuple(stages), tuple(places))

    def alone(self, job: Job) -> Quantities:
        """As `quantities`, as if nothing were sent or updated."""
        ranks = [layers_of_rank(job.plan, place) for place in range(job.plan.degrees["pp"])]
        kinds = {kind: i for i, kind in enumerate(dict.fromkeys(ranks))}
        stages = tuple(Stage(*kind, (), 0) for kind in kinds)
        return self._assembled(job, stages, tuple(kinds[kind] for kind in ranks))

    def floor(self, job: Job) -> float:
        """The bytes that the fullest rank cannot do without."""
        mesh, plan = self.mesh_of(job), job.plan
        ranks = {(kind, layers_of_rank(plan, place)[0]) for place, kind in enumerate(mesh.places)}
        return max(mesh.floor(kind, layers) for kind, layers in ranks)

    def listed(self, config: Config, stages: int) -> tuple[int, ...]:
        """The layers of so many stages, balanced by FLOPs; empty without a pipeline."""
        if stages not in self.balanced:
            balanced = layers_per_stage(config.model, config.train.seq_len, stages) if stages > 1 else []
            self.balanced[stages] = tuple(balanced)
        return self.balanced[stages]

    def _assembled(self, job: Job, kinds: tuple[Stage, ...], places: tuple[int, ...]) -> Quantities:
        degrees, train = job.plan.degrees, job.plan.config.train
        key = (degrees["tp"], degrees["cp"], train.micro_batch_size)
        if key not in self.computed:
            self.computed[key] = computed_of(job.plan)
        if job.products not in self.profiles:
            self.profiles[job.products] = profile_of_job(job)
        return assembled(job, self.computed[key], kinds, places, self.profiles[job.products])

    def mesh_of(self, job: Job) -> Mesh:
        plan, strategy = job.plan, job.plan.config.strategy
        v_shaped = isinstance(strategy, PipelineKeys) and strategy.facts().v_shaped
        recomputes = plan.config.train.activation_checkpointing is not ActivationCheckpointing.none
        key = (plan.ep, plan.num_stages, v_shaped, recomputes, _stage_of_zero(plan))
        if self.degrees != (degrees := tuple(plan.degrees.values())):
            self.degrees, self.meshes = degrees, {}
        if key not in self.meshes:
            self.meshes[key] = Mesh(Small(job), *self._classes(job, (plan.degrees["pp"], plan.num_stages, v_shaped)))
        return self.meshes[key]

    def _classes(self, job: Job, key: Key) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(A rank of `pp` of each class, the class of each rank of `pp`); ranks of a class send the same if they have
        the same number of layers."""
        if key not in self.shapes:
            plan = Small(job).with_layers(1, 2, 1).plan
            found: dict[Hashable, int] = {}
            first: list[int] = []
            places = []
            for place in range(plan.degrees["pp"]):
                kind = found.setdefault(sending_key(plan, place), len(found))
                if kind == len(first):
                    first.append(place)
                places.append(kind)
            self.shapes[key] = tuple(first), tuple(places)
        return self.shapes[key]


def _stage_of_zero(plan: Plan) -> int:
    return int(getattr(plan.config.strategy, "zero_stage", 0))


def priced_job(plan: Plan, products: str) -> Job:
    """The job of a plan. `products`: the precision of its matrix products, which may be one that the lab cannot train
    in."""
    return dataclasses.replace(of_plan(plan), products=products)
