"""The time of a step of a finished run by part, as it was measured, in the same parts as a prediction.

A recorded step gives the parts, but recording makes it slower, so the parts are scaled to the median time of the steps
that were not recorded. They are those of the rank that computes longest. Under a pipeline, waiting for another stage and
sending to it are one part, `pp`: a recording cannot tell them apart.
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

PIPELINE = "exposed pp, bubble"
MAIN = ("train/main.py", "train.main")  # as a command names it in the source tree, and where it is installed


@dataclass(frozen=True)
class Measured:
    """A run: how it was started, and its step. `parts`: milliseconds by part, without parts if no step was recorded.
    `scale`: the median of ordinary steps over the recorded step."""

    path: Path
    overrides: tuple[str, ...]
    world_size: int
    device: str
    step_ms: float
    parts: dict[str, float]
    scale: float


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
    scale = step_ms / recorded if recorded else 1.0
    scaled = {name: ms * scale for name, ms in parts.items()}
    device = str(folder.work.get("device", "unknown"))
    return Measured(path, (*words[start + 1 :],), world_size, device, step_ms, scaled, scale)


def _recorded(path: Path) -> tuple[float, dict[str, float]]:
    """The ms of the last recorded step, and of its parts on the rank that computes longest; (0, {}) without one."""
    files = sorted(path.glob("samples/step-*.json"), key=lambda file: (len(file.name), file.name))
    values = (read_json(files[-1]) if files else None) or {}
    ranks = [rank for rank in values.get("ranks", ()) if isinstance(rank, dict) and "parts_ms" in rank]
    if not ranks:
        return 0.0, {}
    slowest = max(ranks, key=lambda rank: _number(rank["parts_ms"], "forward") + _number(rank["parts_ms"], "backward"))
    spent = slowest["parts_ms"]
    parts: dict[str, float] = defaultdict(float)
    parts["compute"] = _number(spent, "forward") + _number(spent, "backward")
    for name, row in sorted(slowest.get("comm", {}).items()):
        parts[part_of(name.rsplit("/", 1)[0])] += _number(row, "exposed_ms")
    parts["optimiser"] += _number(spent, "optimiser")
    parts["other"] += _number(spent, "other") + _number(spent, "data")
    return _number(slowest, "step_ms"), dict(parts)


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
