"""A run whose ranks are killed: how it is started, what its records say, and the kills. Torch is not imported."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import psutil

from launch.start.environment import source_path
from launch.sweeping.grid import Point
from train.command.overrides import with_quotes
from train.command.process.parent import die_with

SETTLED_S = 1.0  # after a kill no rank of before writes a record any more; new ones need longer to start
POLL_S, PATIENCE_S = 0.1, 600.0
TAIL = 2**16  # bytes of metrics.jsonl: some records
LOSS = "train/loss"
QUIET = ("metrics.tensorboard=false", "metrics.profile_every=0", "train.eval_every=0", "train.eval_batches=1")

Record = dict[str, Any]
T = TypeVar("T")


class Run:
    """A run of a strategy under `launch.local`, which ends with this process. `folder`: where its files are."""

    def __init__(self, folder: Path, point: Point, *words: str, restarts: int = 0) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        own = [f"nproc={point.nproc}", f"restarts={restarts}", f"metrics.dir={with_quotes(str(folder / 'runs'))}"]
        line = [sys.executable, "-m", "launch.local", *QUIET, *point.overrides, *words, *own]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(
                line, env=os.environ | source_path(), stdout=log, stderr=log, preexec_fn=partial(die_with, os.getpid())
            )

    def newest(self) -> Record:
        """The last record; one of step 0 if there is none."""
        for path in files(self.folder, "metrics.jsonl"):
            with path.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - TAIL, 0))
                for line in reversed(file.read().split(b"\n")):
                    with suppress(ValueError):
                        record: Record = json.loads(line)
                        if LOSS in record:
                            return record
        return {"step": 0, "time": 0.0}

    def first_after(self, kill: float) -> Record | None:
        """The first record since the kill at this time, if there is one."""
        settled = kill + SETTLED_S
        if self.newest()["time"] <= settled:
            return None
        return next((record for record in records(self.folder) if record["time"] > settled), None)

    def until(self, happens: Callable[[], T | None]) -> T:
        """Wait until it happens. Raises SystemExit if the run ends before, or makes no step for PATIENCE_S."""
        step, since, has_ended = -1, time.monotonic(), False
        while not (found := happens()):
            if (newest := self.newest()["step"]) != step:
                step, since = newest, time.monotonic()
            if has_ended or time.monotonic() - since > PATIENCE_S:
                raise SystemExit(f"{self.folder} does not go on:\n{(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(POLL_S)
            has_ended = self.process.poll() is not None  # before `happens` looks once more
        return found

    def kill(self, chance: random.Random) -> bool:
        """Kill a random rank. Returns whether there was one."""
        ranks = []
        with suppress(psutil.Error):
            for one in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    ranks += [one] if "RANK" in one.environ() else []
        with suppress(psutil.Error, IndexError):
            chance.choice(ranks).kill()
            return True
        return False

    @contextmanager
    def ended(self) -> Iterator[Run]:
        """The context at whose end this run is over: if it still trains, it is asked to save and to leave."""
        try:
            yield self
        finally:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait()


def files(folder: Path, name: str) -> list[Path]:
    """The files or folders of this name in the directories of the runs."""
    return [*folder.glob(f"runs/*/{name}")]


def lines(folder: Path) -> list[Record]:
    """All whole lines of metrics.jsonl of the only run in this folder; none if it has not begun."""
    found = []
    for path in files(folder, "metrics.jsonl"):
        found += [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return found


def records(folder: Path) -> list[Record]:
    """The records of all steps. A record is written when the next step has been made, or before a save."""
    return [record for record in lines(folder) if LOSS in record]


def lasted(found: Sequence[Record]) -> float:
    """The mean time from one of these records to the next, in seconds."""
    return float(found[-1]["time"] - found[0]["time"]) / (len(found) - 1)


def quiet_step(found: Sequence[Record], every: int, kills: Sequence[float]) -> float:
    """The mean time of a step, in seconds, while nothing is saved and no rank is lost: in the later half of the `every`
    steps between two saves, without a step in whose time one of the `kills` was. The last of these steps does not count
    either, as a step that is saved is recorded at once and the one before it at the same moment."""
    later = [
        two["time"] - one["time"]
        for one, two in pairwise(found[:-1])
        if every // 2 <= one["step"] % every < every - 1
        and not any(one["time"] <= kill <= two["time"] for kill in kills)
    ]
    return statistics.mean(later) if later else lasted(found)
