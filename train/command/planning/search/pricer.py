"""The layouts of a mesh, priced together, so that they share their tables; better splits; and replays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from train.command.planning.constants import Constants
from train.command.planning.footprint import Footprint, footprint, reserve
from train.command.planning.job import Job, missing_figures
from train.command.planning.quantities import Quantities
from train.command.planning.search.layouts import Choices, Layout, Valid, engines, holds
from train.command.planning.search.of_mesh import shares_of
from train.command.planning.search.replay import Replays
from train.command.planning.search.splits import splits
from train.command.planning.search.tables import Tables, priced_job
from train.command.planning.step_time import StepTime, step_time
from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.strategies.memory import GiB
from train.strategies.pipeline.placement import SCHEDULES

KEPT = 200  # layouts that are replayed
CLOSE = 0.1  # of the device's memory: if more is missing, another split does not help


@dataclass(frozen=True)
class Task:
    """What is searched. `base`: a plan with the config and the world, whatever its strategy. `products`: the precision
    of the matrix products."""

    base: Plan
    products: str
    constants: Constants
    choices: Choices
    kept: int = KEPT

    def job(self, layout: Layout) -> Job:
        return priced_job(layout.plan(self.base), self.products)

    @property
    def capacity(self) -> float:
        """The bytes of a device; infinite if they are not known."""
        size = self.base.config.hardware.memory_gib
        return math.inf if size is None else size * GiB


@dataclass(frozen=True)
class Priced:
    """A layout that fits, with its predicted step, the bytes on the fullest rank, and those that must stay free."""

    layout: Layout
    quantities: Quantities
    time: StepTime
    footprint: Footprint
    reserve: float

    @property
    def seconds(self) -> float:
        return self.time.total


@dataclass
class OfMesh:
    """The layouts of a mesh that fit and may be among the best, with their seconds. `larger`: those that do not fit,
    with the bytes that they need at least, as long as no layout is known that fits."""

    valid: int = 0
    priced: int = 0
    best: list[tuple[float, Layout]] = field(default_factory=list)
    larger: list[tuple[float, Layout]] = field(default_factory=list)
    unknown: tuple[str, ...] = ()  # figures of the hardware without which these layouts cannot be priced


class Pricer:
    """Prices layouts of one task in one process."""

    def __init__(self, task: Task) -> None:
        self.task, self.tables, self.valid = task, Tables(), Valid(task.base, task.choices)
        self.bounds: dict[Hashable, float] = {}
        self.replays = Replays()
        self.orders: dict[Hashable, list[tuple[int, ...]]] = {}

    def mesh(self, asked: tuple[tuple[int, ...], float]) -> OfMesh:
        """The layouts of a mesh, given by its degrees, that take less than so many seconds."""
        degrees, bound = asked
        found = OfMesh()
        for group in self.valid.of_mesh(degrees):
            if not found.valid:  # the same for all layouts of a mesh
                found.unknown = tuple(missing_figures(self.task.job(group.first)))
            found.valid += len(group.micros)
            if found.unknown:
                continue
            layouts = [layout for layout in map(self._listed, group) if self._may_take_less(layout, bound)]
            if layouts and (floor := self._floor(layouts[0])) > self.task.capacity:
                # the others need more than the first, but the last may run all its sequences at once, so that no
                # gradients wait for a next microbatch
                found.larger += [(floor, one) for one in (layouts[0], layouts[-1])] if bound == math.inf else []
                continue
            for layout in layouts:
                self._price(layout, bound, found)
        return found

    def promise(self, degrees: tuple[int, ...]) -> float:
        """Seconds below which no layout of a mesh is likely to be: meshes with few come first, so that the bound for
        the others is soon low. Infinite if the mesh breaks a rule."""
        base = self.task.base
        rest = base.config.train.global_batch_size % (degrees[1] * degrees[2])
        first = next(engines(Layout(degrees, 1, 0, None, 1, ActivationCheckpointing.none, 1)))
        return math.inf if rest or not holds(first.plan(base)) else self._computing(self._listed(first))

    def _listed(self, layout: Layout) -> Layout:
        stages = layout.degrees[0] * layout.stages_per_rank
        return dataclasses.replace(layout, layers=self.tables.listed(self.task.base.config, stages))

    def _may_take_less(self, layout: Layout, bound: float) -> bool:
        """Whether two bounds from below, the second one tighter and more work, leave that open."""
        return self._computing(layout) < bound and (bound == math.inf or self._at_least(layout) < bound)

    def _computing(self, layout: Layout) -> float:
        """Seconds that the layout needs if nothing is sent or updated, which many meshes share."""
        key = self._work(layout)
        if key not in self.bounds:
            self.bounds[key] = step_time(self.tables.alone(self.task.job(layout)), self.task.constants).total
        return self.bounds[key]

    def _at_least(self, layout: Layout) -> float:
        """Seconds that it needs if data parallelism sends and updates nothing, which many meshes share too."""
        shares = shares_of(self.task.base.config.model, layout.degrees)
        key = (self._work(layout), layout.uses_fsdp, layout.ep, shares)
        if key not in self.bounds:
            self.bounds[key] = step_time(self.tables.without_data(self.task.job(layout)), self.task.constants).total
        return self.bounds[key]

    def _work(self, layout: Layout) -> Hashable:
        """What decides how long the layout computes, apart from the layers of its stages."""
        pp, replicate, shard, cp, tp = layout.degrees
        facts = SCHEDULES[layout.schedule] if layout.schedule else None
        placed = (layout.stages_per_rank, facts and facts.v_shaped, facts and facts.splits_backward)
        weights: Hashable = layout.zero_stage > 1
        if self.task.base.config.hardware.measured:
            weights = layout.zero_stage, shard, layout.ep > 1
        mesh = (pp, replicate * shard, cp, tp, placed, weights)
        return (*mesh, layout.recomputation, layout.micro_batch_size)

    def _floor(self, layout: Layout) -> float:
        job = self.task.job(layout)
        return 0.0 if job.plan.config.strategy.uses_ddp() else self.tables.floor(job)

    def _price(self, layout: Layout, bound: float, found: OfMesh) -> None:
        found.priced += 1
        job = self.task.job(layout)
        if (seconds := step_time(self.tables.quantities(job), self.task.constants).total) >= bound:
            return
        missing = self.missing(job, math.inf if bound == math.inf else CLOSE * self.task.capacity)
        if missing > 0 and bound == math.inf:
            found.larger.append((missing + self.task.capacity, layout))
        for split in splits(layout.layers) if missing < CLOSE * self.task.capacity else []:
            other = dataclasses.replace(layout, layers=split)
            if (missing <= 0 and other == layout) or self._fits(self.task.job(other)):
                found.best.append((seconds, other))
                return

    def missing(self, job: Job, enough: float = math.inf) -> float:
        """The bytes that the fullest rank lacks; at most 0 if it fits. The search for it ends where a rank lacks
        `enough` bytes; then the result is at least `enough`, and may be less than what the fullest rank lacks."""
        if self.task.capacity == math.inf:
            return 0.0
        free = self.task.capacity - reserve(job)
        return footprint(job, self.tables.seen(job.plan), free + enough).total - free

    def _fits(self, job: Job) -> bool:
        return self.missing(job, enough=1.0) <= 0  # one byte too many is an answer

    def with_better_split(self, layout: Layout) -> tuple[float, Layout]:
        """The fastest split that fits, by the closed form. Which is faster is asked once for all meshes with the same
        stages and work, as what data ranks send once a step hardly depends on it."""
        key = self._work(layout)
        if key not in self.orders:
            ones = [dataclasses.replace(layout, layers=split) for split in splits(self._listed(layout).layers)]
            self.orders[key] = [one.layers for one in sorted(ones, key=self._closed)]
        for split in self.orders[key]:
            one = dataclasses.replace(layout, layers=split)
            if one == layout or self._fits(self.task.job(one)):
                return self._closed(one), one
        return self._closed(layout), layout

    def _closed(self, layout: Layout) -> float:
        return step_time(self.tables.quantities(self.task.job(layout)), self.task.constants).total

    def replay(self, layout: Layout) -> Priced:
        """The layout with its split or with the balanced one, whichever is faster when it is replayed."""
        balanced = self._listed(layout)
        found = []
        for one in dict.fromkeys([balanced, layout]):
            job = self.task.job(one)
            if one == layout or self._fits(job):
                q = self.tables.quantities(job)
                found.append((self.replays.step_time(q, self.task.constants), one, q))
        time, best, q = min(found, key=lambda each: each[0].total)
        shown = dataclasses.replace(best, layers=()) if best == balanced else best
        return Priced(shown, q, time, footprint(q.job), reserve(q.job))


def rank_of(pair: tuple[float, Layout]) -> tuple[float, tuple[Any, ...]]:
    return pair[0], order_of(pair[1])


def order_of(layout: Layout) -> tuple[Any, ...]:
    """A fixed order, for layouts whose figures are equal."""
    kind = [*ActivationCheckpointing].index(layout.recomputation)
    return (*layout.degrees, layout.ep, -layout.zero_stage, layout.schedule or "", layout.stages_per_rank, kind,
            layout.micro_batch_size, layout.layers)  # fmt: skip
