"""Layouts: what a search may choose, all of them that the lab's rules allow, and the plan of each.

A search never changes the model, the global batch, the sequence length, the optimiser or the precision.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from train.command.presets import strategies
from train.command.rules import OF_EVERY_LAYOUT, rules_of_layout
from train.config.plan import Plan
from train.config.rule import divisors
from train.config.rules import batch
from train.config.schema import ActivationCheckpointing, Config
from train.config.strategy import MESH_AXES, Strategy
from train.strategies.data.traffic import MAX_WHOLE
from train.strategies.pipeline.placement import SCHEDULES
from train.strategies.pipelined import Pipeline
from train.strategies.spmd import Spmd

MICRO, RECOMPUTE = "train.micro_batch_size", "train.activation_checkpointing"
# rules that depend on how the batch is cut into microbatches; all others are asked once for all micro batches
OF_MICROBATCHES = {*(rule.name for rule in batch.RULES), "microbatches_and_stages"}


@dataclass(frozen=True)
class Layout:
    """`degrees`: of MESH_AXES. `schedule`: None without a pipeline. `layers`: of each stage; empty: balanced by
    FLOPs."""

    degrees: tuple[int, ...]
    ep: int
    zero_stage: int
    schedule: str | None
    stages_per_rank: int
    recomputation: ActivationCheckpointing
    micro_batch_size: int
    layers: tuple[int, ...] = ()

    @property
    def strategy(self) -> Strategy:
        keys: dict[str, Any] = dict(self.named)
        if self.schedule is None:
            keys |= {"zero_stage": self.zero_stage} if self.zero_stage else {}
            return Spmd(name=self.name, **keys)
        keys |= {"schedule": self.schedule, "layers_per_stage": [*self.layers]}
        if self.stages_per_rank != SCHEDULES[self.schedule].least:
            keys["stages_per_rank"] = self.stages_per_rank
        return Pipeline(name=self.name, **keys)

    @property
    def named(self) -> tuple[tuple[str, int], ...]:
        """The axes that the strategy names, with their degrees."""
        degree = dict(zip(MESH_AXES, self.degrees, strict=True))
        return (*((axis, degree[axis]) for axis in self.axes), *((("ep", self.ep),) if self.ep > 1 else ()))

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of the mesh with a degree above 1; and `dp_shard` where DDP cannot be used, or experts are split."""
        _, replicate, _, _, tp = self.degrees
        wraps = self.ep > 1 or (replicate > 1 and tp > 1)
        pairs = zip(MESH_AXES, self.degrees, strict=True)
        return tuple(axis for axis, degree in pairs if degree > 1 or (axis == "dp_shard" and wraps))

    @property
    def uses_fsdp(self) -> bool:
        return _uses_fsdp(self.axes)

    @property
    def name(self) -> str:
        """The name of the preset with these axes and this stage of ZeRO; else the preset's or the axes' names with the
        stage."""
        axes = frozenset(axis for axis, _ in self.named)
        exact, alike = _presets()
        own = exact.get((axes, self.zero_stage))
        joined = alike.get(axes) or "_".join(axis for axis, _ in self.named)
        return own or (f"{joined}_zero{self.zero_stage}" if self.zero_stage else joined)

    def config(self, config: Config) -> Config:
        """The config with this layout."""
        train = dataclasses.replace(
            config.train, micro_batch_size=self.micro_batch_size, activation_checkpointing=self.recomputation
        )
        return dataclasses.replace(config, strategy=self.strategy, train=train)

    def plan(self, base: Plan) -> Plan:
        return Plan(self.config(base.config), base.world_size)

    @property
    def words(self) -> list[str]:
        """The overrides that compose this layout."""
        strategy = self.strategy
        preset = self.name if self.name in strategies() else ("single" if self.schedule is None else "pp")
        before: Any = strategies()[preset]
        names = [field.name for field in dataclasses.fields(strategy) if field.name != "name"]
        changed = [
            (name, getattr(strategy, name)) for name in names if getattr(strategy, name) != getattr(before, name)
        ]
        words = [] if preset == self.name else [f"strategy.name={self.name}"]
        words += [f"strategy.{name}={_written(value)}" for name, value in changed]
        return [
            f"strategy={preset}",
            *words,
            f"{MICRO}={self.micro_batch_size}",
            f"{RECOMPUTE}={self.recomputation.value}",
        ]


def _written(value: Any) -> str:
    return "null" if value is None else str(value).replace(" ", "").lower()


@cache
def _uses_fsdp(axes: tuple[str, ...]) -> bool:
    return Pipeline(name="", **dict.fromkeys(axes, 1)).uses_fsdp()  # type: ignore[arg-type]


@cache
def _presets() -> tuple[dict[tuple[frozenset[str], int], str], dict[frozenset[str], str]]:
    """Presets by (named axes, ZeRO's stage, which is 0 without FSDP and in a pipeline), and by named axes alone."""
    exact: dict[tuple[frozenset[str], int], str] = {}
    alike: dict[frozenset[str], str] = {}
    for name, one in strategies().items():
        if isinstance(one, Spmd):
            axes = frozenset([*one.mesh_axes(), *(["ep"] if one.ep is not None else [])])
            exact[axes, one.zero_stage if one.uses_fsdp() and not isinstance(one, Pipeline) else 0] = name
            if isinstance(one, Pipeline) or not one.uses_fsdp() or one.zero_stage == 3:
                alike[axes] = name
    return exact, alike


def meshes(base: Plan) -> Iterator[tuple[int, ...]]:
    """Every product of degrees that makes the world, the degrees in the order of MESH_AXES."""
    yield from _products(base.world_size, len(MESH_AXES))


def _products(number: int, factors: int) -> Iterator[tuple[int, ...]]:
    if factors == 1:
        yield (number,)
        return
    for first in divisors(number, number):
        for rest in _products(number // first, factors - 1):
            yield (first, *rest)


@dataclass(frozen=True)
class Choices:
    """Keys that the command line sets, which a search keeps; None: it chooses."""

    micro_batch_size: int | None = None
    recomputation: ActivationCheckpointing | None = None


@dataclass(frozen=True)
class Group:
    """Layouts that differ only in the micro batch."""

    first: Layout
    micros: tuple[int, ...]

    def __iter__(self) -> Iterator[Layout]:
        return (dataclasses.replace(self.first, micro_batch_size=micro) for micro in self.micros)


@dataclass
class Valid:
    """The valid layouts of `base`'s config on its world. Which micro batches a schedule takes is asked once for all
    meshes with the same data ranks."""

    base: Plan
    choices: Choices
    micros: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict)

    def of_mesh(self, degrees: tuple[int, ...]) -> Iterator[Group]:
        rows, rest = divmod(self.base.config.train.global_batch_size, degrees[1] * degrees[2])
        if rest or not self.sound:
            return
        kinds = [*ActivationCheckpointing] if self.choices.recomputation is None else [self.choices.recomputation]
        micro = self.choices.micro_batch_size or 1
        for ep in self._expert_degrees(degrees):
            for layout in engines(Layout(degrees, ep, 0, None, 1, kinds[0], micro)):
                plan = layout.plan(self.base)
                for kind in kinds if holds(plan) else []:
                    # with a split backward torch recomputes a layer once for each of its parameters: never the fastest
                    if plan.config.strategy.splits_backward() and kind is not ActivationCheckpointing.none:
                        continue
                    one = dataclasses.replace(layout, recomputation=kind)
                    micros = self._micros(one, rows)
                    if micros and (kind is kinds[0] or holds(one.plan(self.base))):
                        yield Group(dataclasses.replace(one, micro_batch_size=micros[0]), micros)

    @cached_property
    def sound(self) -> bool:
        """Whether the config follows the rules that no layout decides."""
        return not any(rule.check(self.base) for rule in OF_EVERY_LAYOUT)

    def _expert_degrees(self, degrees: tuple[int, ...]) -> list[int]:
        experts, folded = self.base.config.model.num_experts, degrees[2] * degrees[3]
        return [ep for ep in divisors(folded, folded) if experts % ep == 0] if experts else [1]

    def _micros(self, layout: Layout, rows: int) -> tuple[int, ...]:
        """The sizes of a micro batch that break no rule about microbatches."""
        key = (layout.schedule, layout.stages_per_rank, layout.degrees[0], rows)
        if key not in self.micros:
            sizes = divisors(rows, rows) if self.choices.micro_batch_size is None else [self.choices.micro_batch_size]
            plans = {size: dataclasses.replace(layout, micro_batch_size=size).plan(self.base) for size in sizes}
            self.micros[key] = tuple(size for size, plan in plans.items() if not _any_broken(plan, of_batch=True))
        return self.micros[key]


def engines(first: Layout) -> Iterator[Layout]:
    """ZeRO's stages, or a pipeline's schedules with their stages per rank. Torch's schedules keep up to MAX_WHOLE
    stages gathered; what more of them send depends on the order of the actions, so more are not searched."""
    pp, _, dp_shard, cp, _ = first.degrees
    if pp == 1:
        sharded = first.strategy.uses_fsdp()
        stages = (1, 2, 3) if sharded and dp_shard * cp > 1 else (1,) if sharded else (0,)
        yield from (dataclasses.replace(first, zero_stage=stage) for stage in stages)
        return
    for name, facts in SCHEDULES.items():
        for stages_per_rank in range(facts.least, min(facts.most or MAX_WHOLE, MAX_WHOLE) + 1):
            yield dataclasses.replace(first, schedule=name, stages_per_rank=stages_per_rank)


def holds(plan: Plan) -> bool:
    """Whether the plan breaks no rule of its layout but those about microbatches."""
    return not _any_broken(plan, of_batch=False)


def _any_broken(plan: Plan, *, of_batch: bool) -> bool:
    return any(rule.check(plan) for rule in rules_of_layout(plan) if (rule.name in OF_MICROBATCHES) == of_batch)
