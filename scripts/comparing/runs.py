"""Reading run directories, finished or not. Torch is not imported.

A run that goes on, or was killed, has no summary.json and may have half a last line: what is complete is read.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Record = dict[str, Any]
DEFAULT_WARMUP = 5
DEEPEST = 3  # folders below one that was named: runs/sweep-x/dp-…


@dataclass
class Run:
    """What one directory says."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)  # flat: "train.seed" -> 1234
    work: dict[str, Any] = field(default_factory=dict)  # work.json
    summary: dict[str, Any] = field(default_factory=dict)  # empty until the run has ended
    steps: list[Record] = field(default_factory=list)  # lines with a training loss
    validations: list[Record] = field(default_factory=list)
    sample: dict[str, Any] = field(default_factory=dict)  # the last samples/step-N.json
    sweep: Path | None = None  # the folder of the sweep that it belongs to
    fairness: str = "global"  # of that sweep: global, micro or best
    label: str = ""  # unique among the runs of one table

    @property
    def facts(self) -> dict[str, Any]:
        """summary.json over work.json: the first is written at the end, the second at the start."""
        return self.work | self.summary

    @property
    def strategy(self) -> str:
        return str(self.facts.get("strategy") or self.config.get("strategy.name") or self.path.name.partition("-")[0])

    @property
    def world_size(self) -> int | None:
        found = self.facts.get("world_size") or (m[1] if (m := re.search(r"-ws(\d+)", self.path.name)) else None)
        return None if found is None else int(found)

    @property
    def degrees(self) -> str:
        return " x ".join(f"{axis} {degree}" for axis, degree in self.facts.get("degrees", {}).items())

    @property
    def precision(self) -> str:
        return str(self.facts.get("precision") or self.config.get("precision", "float32"))

    @property
    def status(self) -> str:
        if self.summary:
            return "finished"
        last, planned = self.steps[-1]["step"] if self.steps else 0, self.config.get("train.steps")
        return f"running or cut off at step {last}" + (f" of {planned}" if planned else "")

    @property
    def measured(self) -> list[Record]:
        """The steps after warm-up; all of them if there are no more than that."""
        warmup = self.summary.get("warmup_steps", self.config.get("metrics.warmup_steps", DEFAULT_WARMUP))
        return self.steps[int(warmup) :] or self.steps

    @property
    def unprofiled(self) -> list[Record]:
        """Of these the steps that no profiler slowed; all of them if every step was sampled."""
        return [step for step in self.measured if "time/step_ms" not in step] or self.measured

    @property
    def sampled(self) -> list[Record]:
        """The steps that a profiler looked into: those after warm-up, or the one before if there are none."""
        of = [step for step in self.measured if "time/step_ms" in step]
        return of or [step for step in self.steps if "time/step_ms" in step][-1:]


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{path}.{key}".lstrip(".")).items()
    }


def find_runs(paths: list[Path]) -> list[Run]:
    """Every run named, or below a folder named, once."""
    found = dict.fromkeys(run.resolve() for path in paths for run in _expand(path, DEEPEST))
    return [read_run(path, _sweep(path)) for path in found]


def points_without_run(paths: list[Path]) -> list[str]:
    """A line for each point of the sweeps named, or in a folder named, that failed or could not be run."""
    files = dict.fromkeys(
        file.resolve() for path in paths for file in [path / "points.json", *path.glob("*/points.json")]
    )
    return [
        f"{point.get('label')}: {point['status']}" + (f", {'; '.join(said)}" if (said := point.get("problems")) else "")
        for file in files
        for point in _json(file).get("points", [])
        if point.get("status") in ("failed", "invalid")
    ]


def _expand(path: Path, depth: int) -> list[Path]:
    """The path if it is a run, else the runs below it and those that its points.json names."""
    if _is_run(path):
        return [path]
    if depth == 0 or not path.is_dir():
        return []
    # a sweep's probes are short runs that looked for a batch size
    children = [child for child in sorted(path.iterdir()) if child.name != "probes"]
    below = [run for child in children for run in _expand(child, depth - 1)]
    return below + _runs_named(path)


def _is_run(path: Path) -> bool:
    names = ("metrics.jsonl", "config.yaml")
    return path.is_dir() and (any((path / n).exists() for n in names) or any(path.glob("events.out.tfevents.*")))


def _runs_named(sweep: Path) -> list[Path]:
    """The run directories that stand in the sweep's points.json, wherever they are now."""
    named = [Path(point["run_dir"]) for point in _json(sweep / "points.json").get("points", []) if point.get("run_dir")]
    places = [place for run in named for place in (run, sweep.parent / run.name, sweep / run.name)]
    return [place for place in places if _is_run(place)]


def _sweep(run: Path) -> Path | None:
    """The folder of the sweep that the run is of: it lies in it, or is named by one beside it."""
    if (run.parent / "points.json").exists():
        return run.parent
    beside = (points.parent for points in sorted(run.parent.glob("*/points.json")))
    return next((sweep for sweep in beside if run in (named.resolve() for named in _runs_named(sweep))), None)


def read_run(path: Path, sweep: Path | None = None) -> Run:
    """What stands in a run's directory; what is missing or half written is left out."""
    run = Run(path, sweep=sweep, work=_json(path / "work.json"), summary=_json(path / "summary.json"))
    if sweep is not None:
        run.fairness = str(_json(sweep / "points.json").get("fairness", "global"))
    if (path / "config.yaml").exists():
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        run.config = flat(yaml.load((path / "config.yaml").read_text(), loader) or {})
    records = _lines(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else _events(path)
    run.steps = [record for record in records if "train/loss" in record]
    run.validations = [record for record in records if "validation/loss" in record]
    samples = {int(m[1]): file for file in path.glob("samples/step-*.json") if (m := re.search(r"-(\d+)$", file.stem))}
    for step in sorted(samples, reverse=True):
        run.sample = _json(samples[step])
        if run.sample.get("ranks"):
            break
    return run


def _json(path: Path) -> dict[str, Any]:
    """Empty if the file is missing or not yet whole."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path) -> list[Record]:
    """Every whole line; a line being written, or cut off, is skipped."""
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def _events(path: Path) -> list[Record]:
    """The same records from TensorBoard's event file, in float32; none if there is no such file."""
    if not any(path.glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        EventAccumulator,
    )

    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    steps: dict[tuple[int, bool], Record] = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            key = (event.step, tag.startswith("validation/"))
            steps.setdefault(key, {"step": event.step, "time": event.wall_time})[tag] = event.value
    return [steps[key] for key in sorted(steps)]


def config_differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Config keys that are not the same in all runs, with each run's value (None where it has no such key)."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [run.config.get(key) for run in runs] for key in keys if not key.startswith("metrics.")}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def label(runs: list[Run]) -> None:
    """Name each: the strategy, what sets it apart from others of the same strategy, a number if nothing does."""
    by_strategy: dict[str, list[Run]] = {}
    for run in runs:
        by_strategy.setdefault(run.strategy, []).append(run)
    for strategy, same in by_strategy.items():
        differing = config_differences(same)
        sizes = [run.world_size for run in same]
        for i, run in enumerate(same):
            parts = [f"{key.rpartition('.')[2]}={values[i]}" for key, values in list(differing.items())[:3]]
            if len(set(sizes)) > 1:
                parts.insert(0, f"ws{sizes[i]}")
            run.label = " ".join([strategy, *parts])
        labels = [run.label for run in same]
        for i, run in enumerate(same):
            if labels.count(run.label) > 1 and (earlier := labels[:i].count(run.label)):
                run.label += f" #{earlier + 1}"


def number(value: Any) -> float | None:
    """The value if it is a finite number, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None
