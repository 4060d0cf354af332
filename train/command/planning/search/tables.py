"""The quantities of many layouts of one search. What several of them share is computed once (of_mesh.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from train.command.planning.job import Job, of_plan
from train.command.planning.profile import Profile
from train.command.planning.quantities import (
    Computed,
    Messages,
    Quantities,
    Stage,
    assembled,
    computed_of,
    layers_of_rank,
    profile_of_job,
    quantities,
    sent_for_data,
    sent_for_model,
)
from train.command.planning.search.of_mesh import Mesh, Probe, Sending, Small, shares_of
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing, Config
from train.config.technique import Rank
from train.strategies.equal_ranks import sending_key
from train.strategies.pipeline.placement import SCHEDULES, layers_per_stage

Key = Hashable
Held = tuple[tuple[int, bool], ...]


@dataclass
class Tables:
    """The tables of one search: one model, batch, world and hardware."""

    computed: dict[Key, Computed] = field(default_factory=dict)
    profiles: dict[str, Profile | None] = field(default_factory=dict)
    ranks: dict[Key, Held] = field(default_factory=dict)
    shapes: dict[Key, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    balanced: dict[int, tuple[int, ...]] = field(default_factory=dict)
    shared: dict[Key, dict[Probe, Messages]] = field(default_factory=dict)  # what meshes send alike, as it was asked
    degrees: Key = None  # of the mesh whose layouts are priced now, one after the other
    meshes: dict[Key, Mesh] = field(default_factory=dict)  # of these degrees
    alike: dict[Key, dict[int, Rank]] = field(default_factory=dict)  # of these degrees: ranks with the same parts

    def quantities(self, job: Job) -> Quantities:
        """As `planning.quantities`, for a job whose stages' layers are listed (`listed`)."""
        plan = job.plan
        if plan.config.strategy.uses_ddp():
            return quantities(job)
        mesh = self.mesh_of(job)
        return self._of_stages(job, mesh.places, mesh.messages, mesh.parameters)

    def without_data(self, job: Job) -> Quantities:
        """As `quantities`, as if data parallelism sent nothing and one byte were updated."""
        mesh = self.mesh_of(job)
        return self._of_stages(job, mesh.places, mesh.model.messages, lambda kind, layers: 1)

    def alone(self, job: Job) -> Quantities:
        """As `quantities`, as if nothing were sent and one byte were updated."""
        places = [0] * job.plan.degrees["pp"]
        return self._of_stages(job, places, lambda *of_rank: (), lambda kind, layers: 1)

    def _of_stages(
        self,
        job: Job,
        classes: Sequence[int],
        messages: Callable[[int, int, int, int], Messages],
        parameters: Callable[[int, int], int],
    ) -> Quantities:
        """`classes`: of each rank of `pp`. `messages`, `parameters`: as of a `Mesh`."""
        batch = job.plan.num_microbatches, job.plan.config.train.micro_batch_size
        ranks = [(kind, *held) for kind, held in zip(classes, self.held(job.plan), strict=True)]
        kinds = {rank: i for i, rank in enumerate(dict.fromkeys(ranks))}
        stages = (
            Stage(layers, has_head, messages(kind, layers, *batch), parameters(kind, layers))
            for kind, layers, has_head in kinds
        )
        return self._assembled(job, tuple(stages), tuple(kinds[rank] for rank in ranks))

    def floor(self, job: Job) -> float:
        """The bytes that the fullest rank cannot do without."""
        mesh = self.mesh_of(job)
        ranks = {(kind, layers) for kind, (layers, _) in zip(mesh.places, self.held(job.plan), strict=True)}
        return max(mesh.floor(kind, layers) for kind, layers in ranks)

    def held(self, plan: Plan) -> Held:
        """For each rank of `pp`, its layers and whether it has the head."""
        ranks = plan.degrees["pp"]
        key = (ranks, _v_shaped(plan), *plan.layers_per_stage)
        if key not in self.ranks:
            self.ranks[key] = tuple(layers_of_rank(plan, place) for place in range(ranks))
        return self.ranks[key]

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
        plan, v_shaped = job.plan, _v_shaped(job.plan)
        recomputes = plan.config.train.activation_checkpointing is not ActivationCheckpointing.none
        key = (plan.ep, plan.num_stages, v_shaped, recomputes, _stage_of_zero(plan))
        degrees = self._of_degrees(plan)
        if key not in self.meshes:
            classes, places = self._classes(job, (plan.degrees["pp"], plan.num_stages, v_shaped))
            shares, uses_fsdp = shares_of(plan.config.model, degrees), plan.config.strategy.uses_fsdp()
            alike = (*key, *(plan.degrees[axis] for axis in ("pp", "cp", "tp")), uses_fsdp, shares)
            small, asked = Small(job), self.shared.setdefault(alike, {})
            model, data = Sending(small, classes, sent_for_model, asked), Sending(small, classes, sent_for_data)
            self.meshes[key] = Mesh(small, classes, places, model, data)
        return self.meshes[key]

    def seen(self, plan: Plan) -> dict[int, Rank]:
        """Ranks by number, of plans that split parameters in the same way."""
        self._of_degrees(plan)
        return self.alike.setdefault((type(plan.config.strategy), _stage_of_zero(plan), plan.ep), {})

    def _of_degrees(self, plan: Plan) -> tuple[int, ...]:
        if self.degrees != (degrees := tuple(plan.degrees.values())):
            self.degrees, self.meshes, self.alike = degrees, {}, {}
        return degrees

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


def _v_shaped(plan: Plan) -> bool:
    name = plan.config.strategy.schedule_name()
    return name is not None and SCHEDULES[name].v_shaped


def _stage_of_zero(plan: Plan) -> int:
    return int(getattr(plan.config.strategy, "zero_stage", 0))


def priced_job(plan: Plan, products: str) -> Job:
    """The job of a plan. `products`: the precision of its matrix products, which may be one that the lab cannot train
    in."""
    return dataclasses.replace(of_plan(plan), products=products)
