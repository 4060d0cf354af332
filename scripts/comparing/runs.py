"""A run, finished or not, as read from its directory; and the labels of the runs in a table.

A running or killed run has no summary.json, and its last line may be incomplete: all complete lines are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from scripts.comparing.configs import differences
from scripts.comparing.sweeps import Sweep
from train.command.as_typed import DIGEST
from train.command.process.life import STOPPED, is_alive, read_life
from train.measure.results import LOSS, VALIDATION_LOSS, Results
from train.record.run_files import Record, clean
from train.record.run_folder import flat, hash_of, read_folder, warmup_steps

LABEL_CHARS = 60
LATER = ("eval_batches",)  # keys of `train` that were not yet part of the work in older versions


@dataclass
class Run:
    """The content of one run's directory."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)  # flat: "train.seed" -> 1234
    work: dict[str, Any] = field(default_factory=dict)  # work.json
    summary: dict[str, Any] = field(default_factory=dict)  # empty until the run has ended
    steps: list[Record] = field(default_factory=list)  # lines with a training loss
    validations: list[Record] = field(default_factory=list)
    sample: Record = field(default_factory=dict)  # the last samples/step-N.json
    notes: list[str] = field(default_factory=list)  # what was left out when the directory was read
    sweep: Sweep | None = None  # the sweep that it belongs to
    label: str = ""  # unique among the runs of one table

    @property
    def facts(self) -> Record:
        """The facts of work.json, which is written at the start, and of summary.json, which is written at the end and
        has priority."""
        return self.work | self.summary

    @cached_property
    def compared(self) -> Record:
        """The work that is compared: that of work.json and, from config.yaml, keys that older versions did not count as
        work. Empty if work.json is missing, because then the text is unknown."""
        work = self.work.get("work")
        if not work:
            return {}
        train = work.get("train")
        later = {name: self.config[f"train.{name}"] for name in LATER if f"train.{name}" in self.config}
        return {**work, "train": later | train} if isinstance(train, dict) else dict(work)

    @cached_property
    def work_hash(self) -> str | None:
        """The hash of the work, computed here and not taken from the run's files. It is taken from them only if
        work.json is missing, or has digests instead of values from the environment."""
        hidden = any(isinstance(value, str) and DIGEST.fullmatch(value) for value in flat(self.compared).values())
        return hash_of(self.compared) if self.compared and not hidden else self.facts.get("work_hash")

    @property
    def fairness(self) -> str:
        """The fairness of its sweep: global, micro or best."""
        return self.sweep.fairness if self.sweep else "global"

    @property
    def strategy(self) -> str:
        name = self.config.get("strategy.name") or self.facts.get("strategy") or self.path.name.partition("-")[0]
        return clean(name, LABEL_CHARS) or "-"

    @property
    def world_size(self) -> int | None:
        found = self.facts.get("world_size") or (
            m[1] if (m := re.search(r"-ws(\d{1,9})(?!\d)", self.path.name)) else None
        )
        return None if found is None else int(found)

    @property
    def degrees(self) -> str:
        return " x ".join(f"{axis} {degree}" for axis, degree in self.facts.get("degrees", {}).items())

    @property
    def precision(self) -> str:
        return str(self.config.get("precision") or self.facts.get("precision", "float32"))

    @property
    def status(self) -> str:
        if self.summary:
            return "finished"
        last, planned = self.steps[-1]["step"] if self.steps else 0, self.config.get("train.steps")
        where = f"step {last}" + (f" of {planned}" if planned else "")
        life = read_life(self.path)
        if life is None:  # a run of an older version
            return f"running or stopped at {where}"
        if is_alive(self.path):
            return f"running, at {where}"
        if life.state == STOPPED:
            return f"stopped at {where}: {clean(life.reason, LABEL_CHARS)}"
        return f"cut off at {where}"

    @cached_property
    def results(self) -> Results:
        """The medians, peaks and last values of its steps."""
        return Results.of(self.steps, warmup_steps(self.summary, self.config))


def read_run(path: Path) -> Run:
    """Read the directory of a run. Raises Unreadable if it cannot be compared."""
    folder = read_folder(path)
    steps = [record for record in folder.records if LOSS in record]
    validations = [record for record in folder.records if VALIDATION_LOSS in record]
    return Run(path, folder.config, folder.work, folder.summary, steps, validations, folder.sample, folder.notes)


def label(runs: list[Run]) -> None:
    """Give each run a label: the strategy, the keys in which it differs from runs of the same strategy, and a number if
    there are none."""
    by_strategy: dict[str, list[Run]] = {}
    for run in runs:
        by_strategy.setdefault(run.strategy, []).append(run)
    for strategy, same in by_strategy.items():
        differing = differences([run.config for run in same], between_strategies=False)
        sizes = [run.world_size for run in same]
        for i, run in enumerate(same):
            parts = [
                f"{key.rpartition('.')[2]}={clean(values[i], LABEL_CHARS // 3)}"
                for key, values in list(differing.items())[:3]
            ]
            if len(set(sizes)) > 1:
                parts.insert(0, f"ws{sizes[i]}")
            run.label = clean(" ".join([strategy, *parts]), 2 * LABEL_CHARS)
        labels = [run.label for run in same]
        for i, run in enumerate(same):
            if labels.count(run.label) > 1 and (earlier := labels[:i].count(run.label)):
                run.label += f" #{earlier + 1}"
