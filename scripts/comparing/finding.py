"""Finds runs: folders that were named, those below a named folder, and those that a sweep names. Compressed runs are
found too.

A folder that cannot be read or compared is left out, and one line says why.
"""

from __future__ import annotations

import os
from pathlib import Path

from scripts.comparing.runs import Run, read_run
from scripts.comparing.sweeps import Sweep, entry_of, is_run, is_sweep
from scripts.compressing.record import is_compressed
from train.record.run_files import Unreadable, clean
from train.record.run_folder import POINTS, PROBES

DEEPEST = 3  # levels of folders below a named one: runs/sweep-x/dp-…
MOST_FOLDERS = 20_000


class Search:
    """The runs that were found. `compressed`: the directories of compressed runs. `notes` has one line for each thing
    that was left out."""

    def __init__(self, paths: list[Path]) -> None:
        self.notes: list[str] = []
        self.compressed: list[Path] = []
        self.seen = 0
        self.sweeps: dict[Path, Sweep] = {}
        self.beside: dict[Path, list[Sweep]] = {}
        self.roots = [Path(os.path.realpath(path)) for path in paths]
        self.runs = self._read(dict.fromkeys(run for root in self.roots for run in self._below(root, root, DEEPEST)))
        if self.seen > MOST_FOLDERS:
            self.notes.append(f"only the first {MOST_FOLDERS:,} folders are searched: name fewer")
        self.notes += [line for sweep in self.sweeps.values() for line in sweep.notes]

    def points_without_run(self) -> list[str]:
        """A line for each failed or invalid point of the sweeps that were named, or that are in a named folder."""
        return [
            line
            for folder, sweep in self.sweeps.items()
            if folder in self.roots or folder.parent in self.roots
            for line in sweep.without_run()
        ]

    def _below(self, path: Path, root: Path, depth: int) -> list[Path]:
        """The path itself if it is a run, else the runs below it and those that its points.json names."""
        self.seen += 1
        if self.seen > MOST_FOLDERS:
            return []
        if is_compressed(path):
            self.compressed.append(path)
            return []
        if is_run(path):
            return [path]
        if depth == 0:
            return []
        found = [run for child in self._folders(path, root) for run in self._below(child, root, depth - 1)]
        return found + (self._sweep(path).runs if is_sweep(path) else [])

    def _folders(self, path: Path, root: Path) -> list[Path]:
        """The folders in it, without the probes of a sweep, which are short runs that searched for a batch size."""
        try:
            children = sorted(child for child in path.iterdir() if child.name != PROBES and child.is_dir())
        except OSError as error:
            if path != root:
                self.notes.append(f"{clean(path)}: skipped: {error.strerror}")
            return []
        outside = [child for child in children if not Path(os.path.realpath(child)).is_relative_to(root)]
        self.notes += [
            f"{clean(child)}: skipped: a link that leads out of {clean(root)}: name it to compare it"
            for child in outside
        ]
        return [Path(os.path.realpath(child)) for child in children if child not in outside]

    def _read(self, paths: dict[Path, None]) -> list[Run]:
        runs = []
        for path in paths:
            try:
                run = read_run(path)
            except Unreadable as error:
                self.notes.append(f"{clean(path)}: skipped: {error}")
                continue
            except OSError as error:
                self.notes.append(f"{clean(path)}: skipped: {error.strerror}")
                continue
            run.sweep = self._sweep_of(run)
            runs.append(run)
        return runs

    def _sweep(self, folder: Path) -> Sweep:
        if folder not in self.sweeps:
            self.sweeps[folder] = Sweep.read(folder)
        return self.sweeps[folder]

    def _sweep_of(self, run: Run) -> Sweep | None:
        """The sweep of the run: the one whose folder contains the run, or the one in the same folder that its work.json
        names. A run of an older version does not name a sweep; then it is the one in the same folder whose points name
        the run."""
        folder = run.path.parent
        if is_sweep(folder):
            return self._sweep(folder)
        if "sweep" in run.work:
            named = entry_of(folder, run.work["sweep"] or "")
            return self._sweep(named) if named is not None and is_sweep(named) else None
        if folder not in self.beside:
            folders = sorted(points.parent for points in folder.glob(f"*/{POINTS}"))
            self.beside[folder] = [self._sweep(beside) for beside in folders if is_sweep(beside)]
        return next((sweep for sweep in self.beside[folder] if run.path in sweep.runs), None)
