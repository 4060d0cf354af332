"""Sweeps, by their points.json: which runs are theirs, and which of their points came to nothing."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from train.record.run_files import Record, Unreadable, clean, exists
from train.record.run_folder import FAILED, INVALID, POINTS, read_points

FAIRNESS = ("global", "micro", "best")
RUN_FILES = ("metrics.jsonl", "config.yaml", "work.json", "summary.json")


@dataclass
class Sweep:
    folder: Path
    fairness: str = "global"
    line: str = ""  # as it was typed, after `python -m launch.sweep`
    points: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what of points.json was left out

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep, without a point if its points.json cannot be read."""
        try:
            values, notes = read_points(folder / POINTS)
        except Unreadable as error:
            return cls(folder, notes=[f"{clean(folder)}: the sweep is not known: {error}"])
        fairness = values.get("fairness")
        known = fairness if fairness in FAIRNESS else "global"
        notes = [f"{clean(folder)}: {line}" for line in notes]
        return cls(folder, known, values.get("line", ""), values["points"], notes)

    @cached_property
    def runs(self) -> list[Path]:
        """The run directories that its points name and that lie in it or beside it, wherever the sweep is now."""
        names = dict.fromkeys(point.get("run_dir") or "" for point in self.points)
        places = dict.fromkeys(entry_of(folder, name) for name in names for folder in (self.folder.parent, self.folder))
        runs = [place for place in places if place is not None and is_run(place) and not place.is_symlink()]
        return [Path(os.path.realpath(run)) for run in runs]

    def without_run(self) -> list[str]:
        """A line for each point that failed or could not be run."""
        return [
            f"{point.get('label', 'a point')}: {point['status']}"
            + (f", {'; '.join(problems)}" if (problems := point.get("problems")) else "")
            for point in self.points
            if point.get("status") in (FAILED, INVALID)
        ]


def entry_of(folder: Path, told: str) -> Path | None:
    """What has the last part of a path that a file tells as its name in this folder; None of a name that leads out."""
    name = os.path.basename(told)
    return None if name in ("", ".", "..") else folder / name


def is_run(path: Path) -> bool:
    try:
        return path.is_dir() and (
            any(exists(path / name) for name in RUN_FILES) or any(path.glob("events.out.tfevents.*"))
        )
    except (OSError, ValueError):  # a name that no file can have, a folder that may not be read
        return False


def is_sweep(path: Path) -> bool:
    return exists(path / POINTS) and not is_run(path)
