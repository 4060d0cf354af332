"""Logs what every step cost. It logs one step late, so that the loop never waits for the device that it measures.

The time of a step runs from the end of the previous step (or of an evaluation) to its own end; on an accelerator it is
measured by device events. It includes the cost of logging. Each rank sends its figures to rank 0 as one small tensor,
over a separate gloo group. `metrics.jsonl` is the source of truth; TensorBoard gets the same values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch

from train.command.process.signals import Signals
from train.config.flops import flops_per_token
from train.config.problems import NonFinite
from train.config.schema import Config, OnNonfinite
from train.config.strategy import StepResult, TrainStep
from train.measure.energy import Energy
from train.measure.hardware import Clock, peak_tflops
from train.measure.results import (
    BY_RANK,
    MEMORY,
    STATE_KINDS,
    VALIDATION_LOSS,
    GiB,
    MiB,
    Record,
    Results,
    computed,
)
from train.measure.sampling import Sampled
from train.ranks.batches import Batches
from train.ranks.elastic.carried import Carried
from train.ranks.side_group import SideGroup


class Sink(Protocol):
    """A destination of values. A class that inherits from this one must define only `write` and `close`."""

    def write(self, step: int, values: Record) -> None: ...

    def sample(self, step: int, record: dict[str, Any]) -> None:
        """Store the timelines and the memory of all ranks in a sampled step: the content of samples/step-<N>.json."""
        return None

    def summary(self, values: dict[str, Any]) -> None:
        """Store the content of summary.json. The run is complete, and only `close` follows."""
        return None

    def saved(self) -> None:
        """A checkpoint is about to be saved: make sure that everything so far is on the disk."""
        return None

    def close(self) -> None: ...


def close_all(sinks: list[Sink]) -> None:
    """Close and remove them, so that each is closed once."""
    while sinks:
        sinks.pop(0).close()


@dataclass
class _Pending:
    step: int
    lr: float
    start: Any
    end: Any
    scalars: torch.Tensor  # loss, gradient norm, extras; they are on the host when `end` has happened
    extras: tuple[str, ...]  # tags
    memory: list[float]
    sampled: Sampled
    any_target: bool
    counted: bool = True  # whether it enters the mean energy; False if a recording was read before the next reading


class Metrics:
    """Collective: every rank creates one and calls the same methods. Only rank 0 has sinks."""

    def __init__(
        self,
        config: Config,
        side_group: SideGroup,
        device: torch.device,
        train_step: TrainStep,
        sinks: list[Sink],
        earlier: Sequence[tuple[int, Record]] = (),
        signals: Signals | None = None,
    ) -> None:
        """`earlier`: the records of steps before a resume, each with its step. `signals`: those that this rank has got.
        `asked` becomes the number of a signal that any rank has got, on all ranks in the same call."""
        self.config, self.side_group, self.device = config, side_group, device
        self.train_step, self.sinks = train_step, sinks
        self.world_size = side_group.world.world_size
        self.clock = Clock(device)
        self.process = psutil.Process()
        self.tokens_per_step = config.train.global_batch_size * config.train.seq_len
        self.flops_per_step = flops_per_token(config.model, config.train.seq_len) * self.tokens_per_step
        self.peak_tflops = peak_tflops(config, device)
        self.energy = Energy(config, device, side_group)
        self.pending: _Pending | None = None
        self.results = Results.of((values for _, values in earlier), config.metrics.warmup_steps)
        self.last = earlier[-1] if earlier else (0, {})  # the last record that was written before
        self.noted: Record = {}
        self.signals, self.asked = signals, 0
        self.check: Callable[[], None] | None = None  # raises an error if what the device has computed is incomplete
        self.start = self.clock.mark()

    def resume_clock(self) -> None:
        """Start the clock of the next step here: time before this call belongs to no step."""
        self.flush()
        self.energy.resume()
        self.start = self.clock.mark()

    def log(self, step: int, result: StepResult, lr: float, sampled: Sampled, *, any_target: bool = True) -> None:
        """Keep the figures of this step, and write those of the previous one. A recorded step is written at once,
        because reading its recording took time that belongs to no step. `any_target`: whether any target of the batch
        contributes to the loss."""
        scalars = torch.stack([x.double() for x in (result.loss, result.grad_norm, *result.extras.values())])
        if self.device.type != "cpu":
            host = torch.empty(len(scalars), dtype=torch.float64, pin_memory=True)
            scalars = host.copy_(scalars, non_blocking=True)
        end = self.clock.mark()
        now = _Pending(step, lr, self.start, end, scalars, tuple(result.extras), self._memory(), sampled, any_target)
        if sampled.step_ms is not None:
            now.counted = False
            if self.pending is not None:
                self.pending.counted = False
        self.start = end
        self.flush()
        self.pending = now
        if sampled.step_ms is not None:
            self.resume_clock()

    def saving(self) -> None:
        """Before a save: bring all steps to the disk. Numbers that are not finite are found by this."""
        self.flush()
        for sink in self.sinks:
            sink.saved()

    def note(self, values: Record) -> None:
        """Values that are written with the next step, or with the summary after the last one."""
        self.noted |= values
        self.results.latest |= values

    def validate(self, step: int, batches: Batches) -> None:
        """Compute the validation loss after this step, and log it."""
        self.flush()
        loss_sum = num_valid = 0.0
        for index in range(batches.num_validation):
            loss, valid = self.train_step.evaluate(*batches.validation(index))
            loss_sum, num_valid = loss_sum + loss.item(), num_valid + valid.item()
        if self.check is not None:
            self.check()
        self._write(step, {VALIDATION_LOSS: loss_sum / num_valid if num_valid else math.nan})
        self.resume_clock()

    def make_up(self, carried: Carried, batches: Batches) -> None:
        """Write what is known of the last steps and could not be written, because a rank was lost: their results, and a
        validation that was due. Raises NonFinite as `flush` does."""
        written, values = self.last
        for step, made in sorted(carried.made.items()):
            if step > written:
                any_target = batches.any_target(step)
                self._write(step, computed(made.loss, made.grad_norm, made.lr, made.extras, any_target=any_target))
            self._check_finite(step, made.loss, made.grad_norm)
        validated = written == carried.step and VALIDATION_LOSS in values
        if self.side_group.share_json(self.config.train.validates(carried.step) and not validated):
            self.validate(carried.step, batches)

    def flush(self) -> None:
        """Write the step that is not written yet. Raises NonFinite on every rank if its loss or norm is not finite."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        elapsed_ms = self.clock.elapsed_ms(pending.start, pending.end)  # waits, so the scalars are on the host now
        step_ms = pending.sampled.step_ms or elapsed_ms
        loss, norm, *extras = pending.scalars.tolist()
        joules = self.energy.step_done(pending.step, step_ms, counted=pending.counted)
        own = [step_ms, *pending.memory, *self.train_step.state_bytes().values(), joules]
        by_rank = self.side_group.exchange([*own, self.signals.number if self.signals else 0])
        self.asked = max(int(figures.pop()) for figures in by_rank)
        named = dict(zip(pending.extras, extras, strict=True))
        values = computed(loss, norm, pending.lr, named, any_target=pending.any_target) | pending.sampled.values
        if self.side_group.world.rank == 0:
            values |= self._performance(by_rank[0][0]) | self._memory_values(by_rank)
            values |= self.energy.values([figures[-1] for figures in by_rank], values["perf/tokens_per_s"])
        if self.config.runtime.elastic:
            values["elastic/ranks"] = self.world_size
        values, self.noted = values | self.noted, {}
        self._write(pending.step, values)
        if pending.sampled.ranks is not None:
            for sink in self.sinks:
                sink.sample(pending.step, {"step": pending.step, "ranks": pending.sampled.ranks})
        self._check_finite(pending.step, loss, norm)

    def _check_finite(self, step: int, loss: float, norm: float) -> None:
        if not (math.isfinite(loss) and math.isfinite(norm)) and self.config.train.on_nonfinite is OnNonfinite.stop:
            raise NonFinite(
                f"step {step}: train/loss={loss}, train/grad_norm={norm}: use a lower optim.lr, a longer "
                "optim.warmup_steps, or train.on_nonfinite=ignore to go on"
            )

    def close(self) -> None:
        close_all(self.sinks)

    def _write(self, step: int, values: Record) -> None:
        self.results.add(values)
        for sink in self.sinks:
            sink.write(step, values)

    def _memory(self) -> list[float]:
        """In bytes: the peaks that the device's allocator allocated and reserved in the step; resident memory on a
        CPU."""
        if self.device.type == "cpu":
            return [float(self.process.memory_info().rss)]
        peaks = [torch.accelerator.max_memory_allocated(), torch.accelerator.max_memory_reserved()]
        torch.accelerator.reset_peak_memory_stats()
        return [float(peak) for peak in peaks]

    def _performance(self, step_ms: float) -> Record:
        per_s = 1e3 / step_ms
        tflops = self.flops_per_step * per_s / self.world_size / 1e12
        values = {
            "perf/step_ms": step_ms,
            "perf/tokens_per_s": self.tokens_per_step * per_s,
            "perf/tokens_per_s_per_device": self.tokens_per_step * per_s / self.world_size,
            "perf/model_tflops_per_s_per_device": tflops,
        }
        return values | ({} if self.peak_tflops is None else {"perf/mfu_pct": 100 * tflops / self.peak_tflops})

    def _memory_values(self, by_rank: list[list[float]]) -> Record:
        """The largest value of all ranks under `memory/`, and the value of each rank under `memory_by_rank/`."""
        device = ("resident_gib",) if self.device.type == "cpu" else ("peak_allocated_gib", "peak_reserved_gib")
        names = (*device, *(f"{kind}_mib" for kind in STATE_KINDS))
        values: Record = {}
        for i, name in enumerate(names, start=1):
            unit = GiB if name.endswith("gib") else MiB
            for rank, figures in enumerate(by_rank):
                values[f"{BY_RANK}{name}/rank_{rank}"] = figures[i] / unit
            values[f"{MEMORY}{name}"] = max(figures[i] for figures in by_rank) / unit
        return values
