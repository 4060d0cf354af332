"""The time of a step of a finished run by part, as it was measured, in the same parts as a prediction.

A recorded step gives the parts, but recording makes it slower than the median of the steps that were not recorded. On
an accelerator it slows the host only: kernels take as long as ever, and the device waits between them, which is part of
"other". So "other" is shortened first; what is still too long is scaled, all parts alike. The parts are those of the
rank that waits least for others: the others' messages last as long as they wait for it, be it a slow stage or a host
that records. Under a pipeline, waiting for another stage and sending to it are one part: a recording cannot tell them
apart.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.command.planning.step_time import StepTime
from train.config.traffic import LAB
from train.measure.results import LOSS, Results
from train.record.run_files import Unreadable, number, read_json
from train.record.run_folder import read_folder, warmup_steps

CPU = "cpu"  # a run's device, where recording slows the computation itself
PIPELINE = "exposed pp, bubble"
MAIN = ("train/main.py", "train.main")  # as a command names it in the source tree, and where it is installed


@dataclass(frozen=True)
class Measured:
    """A run: how it was started, and its step. `parts`: milliseconds by part, without parts if no step was recorded.
    `slowed_ms`: what recording added to the recorded step on the host, already taken from "other". `scale`: the median
    of ordinary steps over what was left of the recorded step."""

    path: Path
    overrides: tuple[str, ...]
    world_size: int
    device: str
    step_ms: float
    parts: dict[str, float]
    slowed_ms: float
    scale: float

    @property
    def corrected(self) -> str:
        """What was done to the recorded parts."""
        if not self.parts:
            return "no step was recorded"
        slowed = f"{self.slowed_ms:.1f} ms of recording taken from other, " if self.slowed_ms else ""
        return f"{slowed}parts scaled by {self.scale:.3f}"


def read(path: Path) -> Measured:
    """Raises Unreadable if the folder is not one of a run that has measured steps."""
    folder = read_folder(path)
    steps = [record for record in folder.records if LOSS in record]
    step_ms = Results.of(steps, warmup_steps(folder.summary, folder.config)).median("perf/step_ms")
    words, world_size = shlex.split(folder.work.get("command", "")), folder.work.get("world_size")
    start = next((i for i, word in enumerate(words) if word in MAIN), None)
    if step_ms is None or world_size is None or start is None:
        raise Unreadable(f"{path} is not the folder of a run of {MAIN[0]} with measured steps")
    recorded, parts = _recorded(path)
    device = str(folder.work.get("device", "unknown"))
    slowed = 0.0 if device == CPU else min(max(recorded - step_ms, 0.0), parts.get("other", 0.0))
    scale = step_ms / (recorded - slowed) if recorded else 1.0
    scaled = {name: (ms - slowed if name == "other" else ms) * scale for name, ms in parts.items()}
    return Measured(path, (*words[start + 1 :],), world_size, device, step_ms, scaled, slowed, scale)


def _recorded(path: Path) -> tuple[float, dict[str, float]]:
    """The ms of the last recorded step, and of its parts on the rank that waits least; (0, {}) without one."""
    files = sorted(path.glob("samples/step-*.json"), key=lambda file: (len(file.name), file.name))
    values = (read_json(files[-1]) if files else None) or {}
    found = values.get("ranks")
    ranks = [rank for rank in found if isinstance(rank, dict) and "parts_ms" in rank] if isinstance(found, list) else []
    if not ranks:
        return 0.0, {}
    awaited = min(ranks, key=lambda rank: _number(rank["parts_ms"], "communication"))
    spent = awaited["parts_ms"]
    parts: dict[str, float] = defaultdict(float)
    parts["compute"] = _number(spent, "forward") + _number(spent, "backward")
    unknown = _number(spent, "communication")  # exposed, but of no message that the recording knows
    for name, row in sorted(awaited.get("comm", {}).items()):
        exposed = _number(row, "exposed_ms")
        parts[part_of(name.rsplit("/", 1)[0])] += exposed
        unknown -= exposed
    parts["optimiser"] += _number(spent, "optimiser")
    parts["other"] += _number(spent, "other") + _number(spent, "data") + max(unknown, 0.0)
    return _number(awaited, "step_ms"), dict(parts)


def part_of(axis: str) -> str:
    """The part to which exposed messages of a mesh axis belong."""
    if axis == LAB:
        return "other"
    if axis == "pp":
        return PIPELINE
    return "exposed dp" if axis.startswith(("dp_", "efsdp")) else f"exposed {axis}"


def predicted(step: StepTime) -> dict[str, float]:
    """A prediction in the parts of a measured run, in milliseconds."""
    parts: dict[str, float] = defaultdict(float)
    parts["compute"] = 1e3 * step.compute
    for axis, seconds in sorted(step.exposed.items()):
        parts[part_of(axis)] += 1e3 * seconds
    if step.bubble:
        parts[PIPELINE] += 1e3 * step.bubble
    parts["optimiser"], parts["other"] = 1e3 * step.optimiser, 1e3 * step.other
    return dict(parts)


def _number(values: Any, name: str) -> float:
    found = number(values.get(name)) if isinstance(values, dict) else None
    return 0.0 if found is None else found
