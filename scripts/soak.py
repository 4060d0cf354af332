"""Kill ranks at random moments, and measure what it costs: python scripts/soak.py minutes=10 mtbf_s=60 strategy=dp,fsdp

Each strategy trains for its share of the time under `launch.local` with restarts. Kills come with exponential spacing,
on average one in `mtbf_s` seconds, and each ends a random rank. The interval of saves follows from the measured cost of
one (Young 1974, Daly 2006): sqrt(2 x cost x mtbf). It takes all overrides of train/main.py, and nproc=N.

    MTTR     the time from a kill to the next step that was not done before, with the steps that are done again
    ETTR     the share of the time that was useful: steps x the step of the clean run / the time of the run
    expected ETTR: 1 - cost / interval - (restart + interval / 2) / mtbf, from what was measured

At the end every step must be once in metrics.jsonl, with the losses of a clean run of the same length. The exit code is
1 if they are not. The results are lines of build/soak.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from train.checkpoint.folder import complete, step_of
from train.command.process.streams import lasting
from train.command.resources import ROOT
from train.config import plain_json
from train.record.run_dir import source_commit

CLEAN_STEPS, WARMUP = 60, 10  # of the run that measures a step and a save
RESTARTS = 10_000
POLL_S = 0.02
QUIET = ("metrics.tensorboard=false", "metrics.profile_every=0", "train.eval_every=0", "train.eval_batches=1")


@dataclass
class Soak:
    """The result of one strategy. `step_ms`, `save_s`: of the clean run. `mttr_s`, `redone`: of each kill."""

    strategy: str
    nproc: int
    steps: int
    every: int
    step_ms: float
    save_s: float
    mtbf_s: float
    mttr_s: list[float] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)
    seconds: float = 0.0
    ettr: float = 0.0
    expected: float = 0.0
    equal: bool = False
    commit: str = ""

    def finish(self) -> None:
        self.ettr = self.steps * self.step_ms / 1e3 / self.seconds
        interval = self.every * self.step_ms / 1e3
        restart = statistics.mean(self.mttr_s) if self.mttr_s else 0.0
        again = statistics.mean(self.redone) * self.step_ms / 1e3 if self.redone else 0.0
        self.expected = 1 - self.save_s / interval - (restart + again) * len(self.mttr_s) / self.seconds

    def __str__(self) -> str:
        kills = len(self.mttr_s)
        repaired = f"MTTR {statistics.median(self.mttr_s):.1f} s (median), " if kills else ""
        again = f"{statistics.mean(self.redone):.1f} steps done again a kill, " if kills else ""
        end = "losses equal the clean run's" if self.equal else "LOSSES DIFFER from the clean run's"
        return (
            f"{self.strategy} on {self.nproc}: {self.steps} steps in {self.seconds:.0f} s, {kills} kills, a save every "
            f"{self.every} steps; {repaired}{again}ETTR {100 * self.ettr:.1f} % "
            f"(expected {100 * self.expected:.1f} %); {end}"
        )


def launch(folder: Path, nproc: int, words: list[str], restarts: int) -> subprocess.Popen[bytes]:
    """Start a run under `launch.local`, with its output in a file."""
    line = [sys.executable, "-m", "launch.local", f"nproc={nproc}", f"restarts={restarts}", *QUIET, *words]
    log = (folder / "log").open("ab")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def records(folder: Path) -> list[dict[str, Any]]:
    """The steps in metrics.jsonl of the only run in this folder."""
    found = []
    for path in folder.glob("runs/*/metrics.jsonl"):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                values = json.loads(line)
                if "train/loss" in values:
                    found.append(values)
    return found


def clean(folder: Path, nproc: int, words: list[str], *more: str) -> list[dict[str, Any]]:
    """The records of a run that nobody disturbs. Raises SystemExit if it fails."""
    folder.mkdir()
    process = launch(folder, nproc, [*words, *more], 0)
    if process.wait():
        raise SystemExit(f"the clean run failed:\n{(folder / 'log').read_text()[-2000:]}")
    return records(folder)


def kill_some(folder: Path, process: subprocess.Popen[bytes], soak: Soak, chance: random.Random) -> None:
    """Kill ranks until the run ends."""
    while process.poll() is None:
        until = time.monotonic() + chance.expovariate(1 / soak.mtbf_s)
        while time.monotonic() < until and process.poll() is None:
            time.sleep(POLL_S)
        ranks = ranks_of(process)
        if not ranks or process.poll() is not None:
            continue
        killed, reached = time.monotonic(), last_step(folder)
        saved = max((step_of(path) or 0 for run in folder.glob("runs/*") for path in complete(run)), default=0)
        with suppress(psutil.Error):
            chance.choice(ranks).kill()
        while process.poll() is None and last_step(folder, after=killed) <= reached:
            time.sleep(POLL_S)
        if process.poll() is None:
            soak.mttr_s.append(time.monotonic() - killed)
            soak.redone.append(reached - saved)


def last_step(folder: Path, after: float = 0.0) -> int:
    """The newest step in metrics.jsonl, if it was written after this moment."""
    found = records(folder)
    now = time.monotonic() - time.time()
    return int(found[-1]["step"]) if found and found[-1]["time"] + now > after else 0


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks that have begun to train, so that a kill costs what it costs in a run."""
    found = []
    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if "RANK" in one.environ():
                    found.append(one)
    return found


def run(folder: Path, strategy: str, nproc: int, seconds: float, mtbf_s: float, words: list[str]) -> Soak:
    folder.mkdir()
    words = [f"strategy={strategy}", *words]
    first = clean(folder / "measured", nproc, words, f"train.steps={CLEAN_STEPS}", f"checkpoint.every={WARMUP}")
    later = [values for values in first if values["step"] > WARMUP]
    step_ms = statistics.median(values["perf/step_ms"] for values in later)
    save_s = statistics.median(v["checkpoint/stall_ms"] for v in later if "checkpoint/stall_ms" in v) / 1e3
    every = max(round(math.sqrt(2 * save_s * mtbf_s) / (step_ms / 1e3)), 1)
    steps = max(round(seconds / 2 / (step_ms / 1e3)), every)
    saves = [f"train.steps={steps}", f"checkpoint.every={every}"]
    expected = clean(folder / "clean", nproc, words, *saves)
    step_ms = statistics.median(values["perf/step_ms"] for values in expected if values["step"] > WARMUP)
    soak = Soak(strategy, nproc, steps, every, step_ms, save_s, mtbf_s, commit=source_commit())
    (folder / "killed").mkdir()
    process = launch(folder / "killed", nproc, [*words, *saves], RESTARTS)
    try:
        while not last_step(folder / "killed") and process.poll() is None:
            time.sleep(POLL_S)
        started = time.monotonic()
        kill_some(folder / "killed", process, soak, random.Random(strategy))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    soak.seconds = time.monotonic() - started
    found = [(values["step"], values["train/loss"]) for values in records(folder / "killed")]
    soak.equal = process.returncode == 0 and found == [(v["step"], v["train/loss"]) for v in expected]
    soak.finish()
    return soak


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args(argv).words
    options = {"minutes": "10", "mtbf_s": "60", "strategy": "dp,fsdp,tp", "nproc": "2"}
    options |= dict(word.split("=", 1) for word in words if word.partition("=")[0] in options)
    rest = [word for word in words if word.partition("=")[0] not in options]
    strategies = options["strategy"].split(",")
    seconds = 60 * float(options["minutes"]) / len(strategies)
    out = ROOT / "build" / "soak.jsonl"
    out.parent.mkdir(exist_ok=True)
    good = True
    for strategy in strategies:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            soak = run(Path(folder) / "soak", strategy, int(options["nproc"]), seconds, float(options["mtbf_s"]), rest)
        print(soak, flush=True)
        with out.open("a") as file:
            file.write(plain_json.dumps(asdict(soak)) + "\n")
        good = good and soak.equal
    return 0 if good else 1


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
