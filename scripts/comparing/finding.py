"""Which folders are runs: those that were named, those below a folder that was, and those that a sweep names.

A folder that cannot be read or compared costs itself, and a line that says why.
"""

from __future__ import annotations

import os
from pathlib import Path

from scripts.comparing.runs import Run, read_run
from scripts.comparing.sweeps import Sweep, is_run, is_sweep
from train.record.run_files import Unreadable, clean

DEEPEST = 3  # folders below one that was named: runs/sweep-x/dp-…
MOST_FOLDERS = 20_000


class Search:
    """What was found, and in `said` a line for everything that was left out."""

    def __init__(self, paths: list[Path]) -> None:
        self.said: list[str] = []
        self.seen = 0
        self.sweeps: dict[Path, Sweep] = {}
        self.beside: dict[Path, list[Sweep]] = {}
        self.roots = [Path(os.path.realpath(path)) for path in paths]
        self.runs = self._read(dict.fromkeys(run for root in self.roots for run in self._below(root, root, DEEPEST)))
        if self.seen > MOST_FOLDERS:
            self.said.append(f"only the first {MOST_FOLDERS:,} folders are looked into: name fewer")
        self.said += [line for sweep in self.sweeps.values() for line in sweep.said]

    def points_without_run(self) -> list[str]:
        """A line for each point of the sweeps named, or in a folder named, that failed or could not be run."""
        return [
            line
            for folder, sweep in self.sweeps.items()
            if folder in self.roots or folder.parent in self.roots
            for line in sweep.without_run()
        ]

    def _below(self, path: Path, root: Path, depth: int) -> list[Path]:
        """The path if it is a run, else the runs below it and those that its points.json names."""
        self.seen += 1
        if self.seen > MOST_FOLDERS:
            return []
        if is_run(path):
            return [path]
        if depth == 0:
            return []
        found = [run for child in self._folders(path, root) for run in self._below(child, root, depth - 1)]
        return found + (self._sweep(path).runs if is_sweep(path) else [])

    def _folders(self, path: Path, root: Path) -> list[Path]:
        """Those in it, without a sweep's probes: short runs that looked for a batch size."""
        try:
            children = sorted(child for child in path.iterdir() if child.name != "probes" and child.is_dir())
        except OSError as error:
            if path != root:
                self.said.append(f"{clean(path)}: skipped: {error.strerror}")
            return []
        outside = [child for child in children if not Path(os.path.realpath(child)).is_relative_to(root)]
        self.said += [
            f"{clean(child)}: skipped: a link out of {clean(root)}, name it to compare it" for child in outside
        ]
        return [Path(os.path.realpath(child)) for child in children if child not in outside]

    def _read(self, paths: dict[Path, None]) -> list[Run]:
        runs = []
        for path in paths:
            try:
                run = read_run(path)
            except Unreadable as error:
                self.said.append(f"{clean(path)}: skipped: {error}")
                continue
            except OSError as error:
                self.said.append(f"{clean(path)}: skipped: {error.strerror}")
                continue
            run.sweep = self._sweep_of(path)
            runs.append(run)
        return runs

    def _sweep(self, folder: Path) -> Sweep:
        if folder not in self.sweeps:
            self.sweeps[folder] = Sweep.read(folder)
        return self.sweeps[folder]

    def _sweep_of(self, run: Path) -> Sweep | None:
        """The run lies in its sweep, or is named by one beside it."""
        if is_sweep(run.parent):
            return self._sweep(run.parent)
        if run.parent not in self.beside:
            folders = sorted(points.parent for points in run.parent.glob("*/points.json"))
            self.beside[run.parent] = [self._sweep(folder) for folder in folders if is_sweep(folder)]
        return next((sweep for sweep in self.beside[run.parent] if run in sweep.runs), None)
