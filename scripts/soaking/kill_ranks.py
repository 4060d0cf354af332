"""Kill ranks of elastic runs at random moments: python scripts/soaking/kill_ranks.py kills=20 nproc=4

A run trains under `launch.local` with strategy=dp and runtime.elastic=true. A random rank is killed; when it is back, a
random rank is killed again, until the run ends; then the next run starts. For each kill a line tells the time until the
record of the next step, which is written after the step that follows it. When a run has ended, every step must be once
in its metrics.jsonl, in order, with the results of a run that nobody disturbs, in float64 to 1e-9.

It takes all overrides of train/main.py, and seed=S. The exit code is 1 if a run failed, its results differ, or it
ended before a rank could be killed. The results are lines of build/kill_ranks.jsonl.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from scripts.soaking.run import Record, lines
from train.command.process.streams import lasting
from train.command.resources import ROOT
from train.config import plain_json
from train.config.world import ROLL

SMALL = (
    *("precision=float64", "model.num_layers=2", "model.dim=32", "model.ffn_dim=64", "train.seq_len=64"),
    # 8 rows in microbatches of 2: one for each of 4 ranks, and two for each of 3, of which the last is filled up
    *("train.global_batch_size=8", "train.micro_batch_size=2", "train.eval_batches=2", "train.eval_every=20"),
    *("train.steps=400", "checkpoint.every=10", "metrics.profile_every=0", "metrics.tensorboard=false"),
    *("runtime.device=cpu", "strategy=dp"),
)
FIRST = 10  # the step that a run has made before its first kill
BOUND = 1e-9
POLL_S = 0.02


@dataclass
class Killed:
    """A kill: of which rank of which run, after which step was recorded, and when the next step was recorded."""

    run: int
    rank: int
    after: int
    seconds: float


def launch(folder: Path, nproc: int, words: Iterable[str]) -> subprocess.Popen[bytes]:
    """Start a run under `launch.local` in this folder, with its output in the file `log`."""
    folder.mkdir(exist_ok=True)
    line = [sys.executable, "-m", "launch.local", f"nproc={nproc}", *words]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(line, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text()


def last_step(folder: Path) -> int:
    return max((record["step"] for record in lines(folder)), default=0)


def ranks_of(process: subprocess.Popen[bytes]) -> dict[int, psutil.Process]:
    """The processes that train. Their parents are the keepers."""
    found = {}
    with suppress(psutil.Error):
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                env = one.environ()
                if ROLL in env:
                    found[int(env["RANK"])] = one
    return found


def difference(found: Sequence[Record], expected: Sequence[Record]) -> float:
    """The largest relative difference of a result; infinite if the records are not those of the same steps."""

    def results(records: Sequence[Record]) -> list[tuple[int, str, float]]:
        return [
            (one["step"], tag, one[tag]) for one in records for tag in one if tag.startswith(("train/", "validation/"))
        ]

    ours, theirs = results(found), results(expected)
    if [one[:2] for one in ours] != [one[:2] for one in theirs]:
        return float("inf")
    pairs = zip(ours, theirs, strict=True)
    return max(abs(a[2] - b[2]) / max(abs(b[2]), 1e-30) for a, b in pairs)


def said(log: str, rank: int, what: str) -> list[int]:
    """The steps after which a run with this log said that the rank is lost or back."""
    line = rf"^.*\branks? (?:\d+, )*{rank}(?:, \d+)* {what} .*?after step (\d+): "
    return [int(step) for step in re.findall(line, log, re.M)]


def disturb(folder: Path, process: subprocess.Popen[bytes], most: int, run: int, chance: random.Random) -> list[Killed]:
    """Kill up to so many ranks, one after the other, until the run ends."""
    kills: list[Killed] = []
    wait_until(process, lambda: last_step(folder) >= FIRST)
    while process.poll() is None and len(kills) < most:
        time.sleep(chance.uniform(0, 2))
        if (killed := kill_one(folder, process, run, chance)) is not None:
            kills.append(killed)
            how = f"killed at step {killed.after}, the next step is recorded after {killed.seconds:.2f} s"
            print(f"run {run}: rank {killed.rank} {how}", flush=True)
    return kills


def kill_one(folder: Path, process: subprocess.Popen[bytes], run: int, chance: random.Random) -> Killed | None:
    """Kill a rank, and return when it is back. None if the run ended before anybody noticed."""
    ranks = ranks_of(process)
    if not ranks:
        return None
    rank = chance.choice(sorted(ranks))
    before, after, killed = len(said(log_of(folder), rank, "lost")), last_step(folder), time.time()
    with suppress(psutil.Error):
        ranks[rank].kill()
    wait_until(process, lambda: len(said(log_of(folder), rank, "lost")) > before)
    lost = said(log_of(folder), rank, "lost")
    if len(lost) <= before:
        return None
    wait_until(process, lambda: len(said(log_of(folder), rank, "back")) > before)
    written = [one["time"] for one in lines(folder) if one["step"] == lost[-1] + 1 and "train/loss" in one]
    return Killed(run, rank, after, written[0] - killed) if written else None


def wait_until(process: subprocess.Popen[bytes], happens: Callable[[], bool]) -> None:
    """Return when it has happened, or the process has ended."""
    while process.poll() is None and not happens():
        time.sleep(POLL_S)


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Within this context the process runs; at its end it is killed, if it has not ended."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args(argv).words
    options = {"kills": "20", "nproc": "4", "seed": "1"}
    options |= dict(word.split("=", 1) for word in words if word.partition("=")[0] in options)
    rest = [*SMALL, *(word for word in words if word.partition("=")[0] not in options)]
    kills, nproc, chance = int(options["kills"]), int(options["nproc"]), random.Random(options["seed"])
    out = ROOT / "build" / "kill_ranks.jsonl"
    out.parent.mkdir(exist_ok=True)
    found: list[Killed] = []
    worst, run, good = 0.0, 0, True
    with tempfile.TemporaryDirectory(prefix="kill_ranks-") as temporary:
        clean = Path(temporary) / "clean"
        with ended(process := launch(clean, nproc, rest)):
            process.wait()
        if process.returncode:
            raise SystemExit(f"the undisturbed run failed:\n{log_of(clean)[-2000:]}")
        expected = lines(clean)
        while good and len(found) < kills:
            run += 1
            folder = Path(temporary) / f"run_{run}"
            with ended(process := launch(folder, nproc, [*rest, "runtime.elastic=true"])):
                of_run = disturb(folder, process, kills - len(found), run, chance)
                process.wait()
            found += of_run
            code, differs = process.returncode, difference(lines(folder), expected)
            worst, good = max(worst, differs), code == 0 and differs <= BOUND and len(of_run) > 0
            print(
                f"run {run}: {len(of_run)} kills, exit code {code}, largest relative difference {differs:.1e}",
                flush=True,
            )
            if not good:
                print(log_of(folder)[-3000:], flush=True)
            with out.open("a") as file:
                values = {"code": code, "difference": differs, "nproc": nproc}
                file.write(plain_json.dumps(values | {"kills": [asdict(one) for one in of_run]}) + "\n")
    seconds = [one.seconds for one in found] or [float("nan")]
    print(
        f"{len(found)} kills in {run} run(s): next step after {statistics.median(seconds):.2f} s (median), at most "
        f"{max(seconds):.2f} s; largest relative difference {worst:.1e}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    lasting()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the run ends too
    sys.exit(main(sys.argv[1:]))
