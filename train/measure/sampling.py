"""Sampled steps: from time to time a step is recorded by the profiler, and what it shows is logged with the step.

The first sampled step is FIRST (or the last step of a shorter run); then one follows every `metrics.profile_every`
steps. All ranks wait for each other before it, so that their timelines have the same zero. Recording makes a step
slower, so a comparison does not use sampled steps for the throughput. The time of reading the recording belongs to no
step.

The ledger counts what a step sends, in step COUNTED, which is in warm-up. For code that is compiled for a GPU, a
recording gives the traffic instead, because the ledger would make compiled blocks run eagerly.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from train.config.plan import Plan
from train.config.schema import Config
from train.config.strategy import TrainStep
from train.measure import breakdown, peak
from train.measure.ledger import Ledger, axis_size
from train.measure.recording import Recorder, Recording
from train.measure.results import AT_PEAK, COMPUTE_PARTS, RECORDED, TIME_PARTS, Record
from train.model.spans import length
from train.ranks.side_group import SideGroup

FIRST, COUNTED = 10, 3  # COUNTED counts from the first step that is run


@dataclass
class Sampled:
    """What is known of a step beside its ordinary figures. `values`: values to log with it, on rank 0. `step_ms`: its
    recorded time, or None if it was not recorded. `ranks`: the parts of all ranks for samples/step-N.json, on rank 0.
    """

    values: Record = field(default_factory=dict)
    step_ms: float | None = None
    ranks: list[dict[str, Any]] | None = None


class Sampler:
    """Collective: every rank creates one, runs each step inside `watch`, and then calls `collect`."""

    def __init__(
        self,
        config: Config,
        mesh: DeviceMesh,
        device: torch.device,
        train_step: TrainStep,
        side_group: SideGroup,
        run: Path | None = None,
        first: int = 1,
    ) -> None:
        """`run`: the run's directory, where traces are stored if `metrics.trace` is true. `first`: the first step that
        is run, which is a later one after a resume."""
        self.config, self.mesh, self.device, self.train_step, self.side_group = (
            config,
            mesh,
            device,
            train_step,
            side_group,
        )
        self.counted = min(first + COUNTED - 1, config.train.steps)
        self.sent: Record = {}  # under the tags comm/…, from the step that was counted
        # compiled blocks run eagerly under the ledger. This is harmless on a CPU, but needs too much memory and time on
        # a GPU
        self.counts = not (config.compile.enabled and device.type != "cpu")
        self.recorder: Recorder | None = None
        self.known: dict[str, peak.Addresses] = {}
        self.traces = run / "traces" if run is not None and config.metrics.trace else None

    def due(self, step: int) -> bool:
        every, first = self.config.metrics.profile_every, min(FIRST, self.config.train.steps)
        return every > 0 and step >= first and (step - first) % every == 0

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """Runs around one step, including the fetching of its batch."""
        recorded = self.due(step)
        counted = self.counts and (recorded or step == self.counted)
        ledger = Ledger(self.mesh, named=recorded) if counted else None
        with self._recorded() if recorded else nullcontext(), ledger or nullcontext():
            yield
        if ledger is not None:
            self.sent = ledger.values()

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        held, kind = self.train_step.state_tensors(), self.device.type
        self.known = {name: peak.storages(held[name], kind) for name in ("parameters", "optimiser")}
        before: Callable[[], None] | None = self.train_step.on_gradients

        def note_gradients() -> None:
            self.known["gradients"] = peak.storages(self.train_step.state_tensors()["gradients"], kind)

        self.train_step.on_gradients = note_gradients
        self.recorder = Recorder(self.device, self.mesh)
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # work of the previous step does not belong to this one
        self.side_group.barrier()
        try:
            with self.recorder:
                yield
        finally:
            self.train_step.on_gradients = before

    def collect(self, step: int) -> Sampled:
        """What the step that just ran inside `watch` showed. Collective if it was recorded."""
        if self.recorder is None:
            return Sampled(dict(self.sent))
        keep = self.traces / f"step-{step}-rank-{self.side_group.world.rank}.json.gz" if self.traces else None
        recording, self.recorder = self.recorder.recording(keep), None
        give_back_memory()
        if not self.counts:
            self.sent = sent(recording)
        own = {"rank": self.side_group.world.rank, **self._own(recording)}
        ranks = self.side_group.gather_json(own)
        values = {} if ranks is None else self.sent | self._values(ranks)
        return Sampled(values, recording.step_ms, ranks)

    def _own(self, recording: Recording) -> dict[str, Any]:
        found = breakdown.parts(recording)
        return {
            "step_ms": recording.step_ms,
            "parts_ms": {name: length(intervals) for name, intervals in found.items()},
            "comm": breakdown.collectives(recording, found["communication"]),
            "timeline": breakdown.actions(recording),
            "memory": peak.at_peak(recording, self.known),
        }

    def _values(self, ranks: list[dict[str, Any]]) -> Record:
        """The tags of a sampled step. They are means over ranks, except memory, which is that of the rank whose peak is
        highest."""
        values = {f"time/{part}_ms": mean(r["parts_ms"][part] for r in ranks) for part in TIME_PARTS}
        values[RECORDED] = mean(r["step_ms"] for r in ranks)
        values |= self._collectives(ranks) | self._pipeline([r["timeline"] for r in ranks])
        fullest = max((r["memory"]["at_peak_mib"] for r in ranks), key=lambda kinds: sum(kinds.values()))
        values |= {f"{AT_PEAK}{kind}_mib": size for kind, size in fullest.items()}
        compute = [sum(r["parts_ms"][part] for part in COMPUTE_PARTS) for r in ranks]
        named = {"min": min(compute), "median": median(compute), "max": max(compute)}
        values |= {f"stragglers/compute_ms_{name}": value for name, value in named.items()}
        return values | {"stragglers/slowest_rank": float(compute.index(max(compute)))}

    def _collectives(self, ranks: list[dict[str, Any]]) -> Record:
        values: Record = {}
        for name in sorted({name for r in ranks for name in r["comm"]}):
            rows = [r["comm"][name] for r in ranks if name in r["comm"]]
            row = {key: mean(each[key] for each in rows) for key in rows[0]}
            axis, op = name.rsplit("/", 1)
            row |= breakdown.bandwidths(row, op, axis_size(axis, self.mesh))
            values |= {f"comm/{name}_{key}": value for key, value in row.items() if key not in ("calls", "mib")}
        return values

    def _pipeline(self, timelines: list[breakdown.Timeline]) -> Record:
        plan = Plan(self.config, self.side_group.world.world_size)
        order = self.config.strategy.order(plan.degrees["pp"], plan.num_microbatches)
        if order is None or not all(timelines):
            return {}
        values = {
            "pipeline/bubble_pct": 100 * breakdown.measured_bubble(timelines),
            "pipeline/bubble_theory_pct": 100 * breakdown.theory_bubble(timelines, order),
        }
        if order.closed_form is not None:
            values["pipeline/bubble_closed_form_pct"] = 100 * order.closed_form
        return values


def give_back_memory() -> None:
    """Return the memory that reading a recording needed to the system. Otherwise it would stay in the resident memory
    of the process."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)  # only glibc has it


def sent(recording: Recording) -> Record:
    """The same values as `Ledger.values`, from the messages of a recording."""
    rows = breakdown.collectives(recording, [])
    return {f"comm/{name}_{key}": row[key] for name, row in sorted(rows.items()) for key in ("mib", "calls")}
