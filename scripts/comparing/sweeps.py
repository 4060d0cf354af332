"""Reads sweeps from their points.json: their runs, and their points that failed or were invalid."""

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
    line: str = ""  # the arguments of `python -m launch.sweep`, as typed
    points: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what was left out of points.json

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """Read the sweep. It has no points if its points.json cannot be read."""
        try:
            values, notes = read_points(folder / POINTS)
        except Unreadable as error:
            return cls(folder, notes=[f"{clean(folder)}: the sweep cannot be read: {error}"])
        fairness = values.get("fairness")
        known = fairness if fairness in FAIRNESS else "global"
        notes = [f"{clean(folder)}: {line}" for line in notes]
        return cls(folder, known, values.get("line", ""), values["points"], notes)

    @cached_property
    def runs(self) -> list[Path]:
        """The run directories that its points name, if they are in the sweep's folder or beside it. This works even if
        the sweep was moved."""
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
    """The entry of this folder with the same name as the last part of the path `told`, which comes from a file. None if
    the name leads out of the folder."""
    name = os.path.basename(told)
    return None if name in ("", ".", "..") else folder / name


def is_run(path: Path) -> bool:
    try:
        return path.is_dir() and (
            any(exists(path / name) for name in RUN_FILES) or any(path.glob("events.out.tfevents.*"))
        )
    except (OSError, ValueError):  # a name that no file can have, or a folder without permission to read
        return False


def is_sweep(path: Path) -> bool:
    return exists(path / POINTS) and not is_run(path)
