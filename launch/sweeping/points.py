"""The state of a sweep's points, in <metrics.dir>/sweep-<id>/points.json. The file is replaced as a whole.

The id is a hash of the points, in any order, so that the same sweep finds its folder again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.sweeping.grid import Checked, Point
from train.checkpoint.folder import complete, ended
from train.config import plain_json
from train.config.problems import unusable
from train.record.run_files import Record, Unreadable, exists, number, read_text, write_whole
from train.record.run_folder import DONE, INVALID, POINTS, PROBES, WAITING, read_facts, read_points

RUN_DIR = re.compile(r".+-ws\d+-[0-9a-f]{6}(-\d+)?")


@dataclass
class Entry:
    """A point in points.json. `tried`: tokens/s by micro batch under `batch=best`; None if it did not run."""

    label: str
    overrides: list[str]
    nproc: int
    log: str  # the file's name in the sweep's folder
    status: str = WAITING
    run_dir: str | None = None
    exit_code: int | None = None
    seconds: float | None = None
    problems: list[str] = field(default_factory=list)
    tried: dict[str, float | None] = field(default_factory=dict)
    chosen: list[str] = field(default_factory=list)  # the overrides that were chosen because of `tried`

    def discard(self, folder: Path, *, but_saved: bool = False) -> Path | None:
        """Remove the directory of a run of this point that was not finished, so that a point has only one run. Returns
        the removed directory. `but_saved`: keep it if the same command continues it from a checkpoint.
        Raises BadInput (exit code 3) if it cannot be removed."""
        try:
            path = Path(read_text(folder / self.run_file).strip()) if exists(folder / self.run_file) else None
        except Unreadable:
            return None
        if path is None or path.is_symlink() or not path.is_dir() or (path / "summary.json").exists():
            return None
        places = (
            folder.parent.resolve(),
            (folder / PROBES).resolve(),
        )  # any other path in the file is not a run of this sweep
        if path.resolve().parent not in places or not RUN_DIR.fullmatch(path.name):
            return None
        if but_saved and complete(path) and not ended(path):
            return None
        try:
            shutil.rmtree(path)
        except OSError as error:
            raise unusable(path, error.strerror) from error
        return path

    def settle(self, folder: Path) -> None:
        """Read the run's directory from the file that rank 0 wrote. A run with a summary is done, even if the sweep was
        ended before it."""
        run_file = folder / self.run_file
        try:
            if exists(run_file):
                self.run_dir = read_text(run_file).strip() or None
            done = self._summary() is not None
        except Unreadable as error:
            print(f"{self.label}: not counted as done: {error}", file=sys.stderr)
            done = False
        if done:
            self.status = DONE

    def recall(self, old: Record) -> None:
        """Take over the results of an earlier start. A key that an older version did not write is not changed."""
        for name in ("run_dir", "exit_code", "seconds", "chosen"):
            setattr(self, name, old.get(name, getattr(self, name)))
        # a size that did not run is tried again, unless the search has found a best size
        self.tried = {size: speed for size, speed in old.get("tried", {}).items() if self.chosen or speed is not None}

    @property
    def run_file(self) -> str:
        """The name of the file in which rank 0 writes the path of its run's directory."""
        return Path(self.log).stem + ".run"

    def probe_log(self, micro_batch: int) -> str:
        """The name of the log of a short run, in the search for the best micro batch."""
        return f"{Path(self.log).stem}.micro-{micro_batch}.log"

    def summary(self) -> Record | None:
        """The run's summary.json, which exists only if the run was finished; None if it cannot be read."""
        try:
            return self._summary()
        except Unreadable:
            return None

    def _summary(self) -> Record | None:
        values = read_facts(Path(self.run_dir) / "summary.json") if self.run_dir else {}
        if values and number(values.get("perf/tokens_per_s")) is None:
            raise Unreadable("summary.json has no perf/tokens_per_s")
        return values or None


@dataclass
class State:
    folder: Path
    fairness: str
    line: str  # as it was typed
    entries: list[Entry]

    @classmethod
    def of(cls, root: Path, checked: Sequence[Checked], fairness: str, line: str, bound: int | None) -> State:
        """The state of a new sweep. `bound`: the largest micro batch under `batch=best`."""
        points = sorted([[*one.point.overrides], one.point.nproc, *one.environment] for one in checked)
        digest = hashlib.sha256(json.dumps([points, fairness, bound]).encode()).hexdigest()[:6]
        logs = _log_names([one.point for one in checked])
        entries = [
            Entry(one.point.label, [*one.point.overrides], one.point.nproc, log)
            for one, log in zip(checked, logs, strict=True)
        ]
        for entry, one in zip(entries, checked, strict=True):
            if one.problems:
                entry.status, entry.problems = INVALID, [str(problem) for problem in one.problems]
        return cls(root / f"sweep-{digest}", fairness, line, entries)

    @property
    def path(self) -> Path:
        return self.folder / POINTS

    def resume(self) -> None:
        """Take over the results of an earlier start of the same sweep. A point that failed is run again. If a point
        cannot be read from points.json, the files of its run decide whether it is done."""
        try:
            values, said = read_points(self.path)
        except Unreadable as error:
            values, said = {"points": []}, [f"{error}; points are known by their runs alone"]
        for line in said:
            print(f"{self.folder}: {line}", file=sys.stderr)
        before = {_key(old): old for old in values["points"] if "overrides" in old and "nproc" in old}
        for entry in self.entries:
            if entry.status != INVALID:
                entry.recall(before.get(_key(dataclasses.asdict(entry)), {}))
                entry.settle(self.folder)

    def forget(self) -> None:
        """Do not use results of an earlier start. Directories of finished runs are kept, but no point refers to
        them."""
        for entry in self.entries:
            entry.discard(self.folder)
        for run_file in self.folder.glob("*.run"):
            run_file.unlink()

    def save(self) -> None:
        values = {"fairness": self.fairness, "line": self.line, "points": [dataclasses.asdict(e) for e in self.entries]}
        write_whole(self.path, plain_json.dumps(values, indent=2) + "\n")

    def with_status(self, status: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == status]


def _key(values: Record) -> str:
    return json.dumps([values["overrides"], values["nproc"]])


def _log_names(points: Sequence[Point]) -> list[str]:
    """Readable and unique names, for example `tp_train.micro_batch_size=2.log`."""
    names: list[str] = []
    for point in points:
        name = re.sub(r"[^\w.=+-]+", "_", point.label)[:80]
        if f"{name}.log" in names:
            name += "-" + hashlib.sha256(json.dumps([point.overrides, point.nproc]).encode()).hexdigest()[:6]
        names.append(f"{name}.log")
    return names
