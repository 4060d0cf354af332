"""The folder `checkpoints` of a run: names, commit, and removal of older checkpoints. Torch is not imported.

    step-120.tmp-4711-…    being written; whatever has such a name is removed at the next start
    step-100               complete: everything in it was on the disk before it got this name
    latest                 the name of the newest complete checkpoint that has been verified

A commit writes the files, their hashes, and the folder to the disk, renames the folder, compares all files with their
hashes, replaces `latest`, and only then removes older checkpoints. A crash at any moment leaves the older ones as they
are.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

from train.command.process.life import STOPPED, read_life
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.record.run_files import write_whole

CHECKPOINTS, LATEST = "checkpoints", "latest"
COMPLETE = re.compile(r"step-([1-9]\d{0,11})")
UNFINISHED = re.compile(r"step-\d{1,12}\.tmp-.*")


def sync(folder: Path) -> None:
    """Make sure that the names in the folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_of(checkpoint: Path) -> int | None:
    """The step of a folder with the name of a complete checkpoint; None for another name."""
    match = COMPLETE.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def complete(run: Path) -> list[Path]:
    """The folders with the name of a complete checkpoint, from the newest to the oldest."""
    try:
        found = [path for path in (run / CHECKPOINTS).iterdir() if step_of(path) and path.is_dir()]
    except OSError:
        return []
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def checkpoints_in(path: Path) -> list[Path]:
    """The path itself if it is a checkpoint; else those of the run, from the newest to the oldest."""
    return [path] if step_of(path) is not None and path.is_dir() else complete(path)


def ended(run: Path) -> str:
    """How the run has ended by itself, as the end of a sentence; empty if it was cut off, and could go on."""
    life = read_life(run)
    if (run / "summary.json").exists():
        return "is finished"
    return f"was stopped: {life.reason}" if life is not None and life.state == STOPPED else ""


class Folder:
    """A run's checkpoints, for the process that writes them: rank 0. `keep`: how many complete ones stay."""

    def __init__(self, run: Path, keep: int) -> None:
        self.run, self.path, self.keep = run, run / CHECKPOINTS, keep

    def latest(self) -> int:
        """The step of the newest checkpoint that has been verified; 0 without one."""
        with suppress(OSError):
            return step_of(Path((self.path / LATEST).read_text(encoding="utf-8").strip())) or 0
        return 0

    def begin(self, step: int) -> Path:
        """Make the folder for a checkpoint that is to be written. It has a new name, as a thread of a generation that
        is over (`runtime.elastic`) may still write to the last one. Raises OSError."""
        if not self.path.is_dir():
            self.path.mkdir()
            sync(self.run)
        folder = self.path / f"step-{step}.tmp-{os.getpid()}-{time.monotonic_ns()}"
        folder.mkdir()
        return folder

    def commit(self, unfinished: Path) -> Path:
        """Give the folder, whose files are on the disk, its final name. An older checkpoint of the same step, which
        could not be used when the run went on, is removed. Raises OSError."""
        sync(unfinished)
        final = unfinished.with_name(unfinished.name.partition(".")[0])
        if final.exists():
            self._remove(final)
        os.rename(unfinished, final)
        sync(self.path)
        return final

    def accept(self, checkpoint: Path) -> None:
        """Name the checkpoint, which has been verified, as the latest, and remove all older ones but the newest
        `keep`. Checkpoints of later steps, from which the run did not go on, are removed too. Raises OSError."""
        write_whole(self.path / LATEST, f"{checkpoint.name}\n")
        sync(self.path)
        step = step_of(checkpoint) or 0
        older = [path for path in complete(self.run) if (step_of(path) or 0) <= step]
        for path in [*(set(complete(self.run)) - set(older)), *older[self.keep :]]:
            self._remove(path)

    def clean(self) -> None:
        """Remove what an earlier process of the run left unfinished: checkpoints, and files of `write_whole`."""
        for file in self.run.rglob(".*.tmp"):
            file.unlink(missing_ok=True)
        if self.path.is_dir():
            for path in self.path.iterdir():
                if UNFINISHED.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)

    def discard(self, unfinished: Path) -> None:
        """Remove a checkpoint that could not be written, so that it does not fill the disk."""
        shutil.rmtree(unfinished, ignore_errors=True)

    def _remove(self, path: Path) -> None:
        """Take the name of a complete checkpoint away first, so that a part of one never has it."""
        gone = path.with_name(f"{path.name}.tmp-{os.getpid()}-old")
        shutil.rmtree(gone, ignore_errors=True)  # of an earlier removal that failed
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def shown_bytes(size: int) -> str:
    """The size in GiB or, if it is smaller, in MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def check_space(root: Path, size: int, copies: int, run: Path | None) -> None:
    """Raise BadInput (exit code 3) if the disk of `root` has no room for so many checkpoints of `size` bytes. `run`:
    the directory in which a run goes on, whose checkpoints are among them. Raises OSError."""
    held = sum(path.stat().st_size for path in (run / CHECKPOINTS).rglob("*") if path.is_file()) if run else 0
    free = shutil.disk_usage(root).free + held
    if free < copies * size:
        has = f"{shown_bytes(free)}{' with those that the run has' if held else ''}"
        message = f"{copies} checkpoints of {shown_bytes(size)} need more than the disk of {root} has: {has}"
        fix = "free some space, use metrics.dir=FOLDER on another disk, or checkpoint.every=0 to save none"
        raise BadInput(Problem("checkpoint_space", message, fix, exit_code=EXIT_ENVIRONMENT))
