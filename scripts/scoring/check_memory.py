"""Print predicted and measured peaks of memory: python -m scripts.scoring.check_memory runs/FOLDER … [hardware=X]

For each run of train/main.py the peak is predicted from the command that is stored with the run. The measured one is
the most that the allocator had given to the largest rank in any step. With a hardware file, it also says whether the
run should have fitted the device; a run that ended before its first step counts as one that ran out of memory.
"""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from launch.checking.records import MAIN
from train.command import cli
from train.command.planning.footprint import Footprint, footprint, reserve
from train.command.planning.job import Job, of_plan
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.world import World
from train.record.run_files import Unreadable, number
from train.record.run_folder import read_folder
from train.strategies.memory import GiB

HARDWARE = "hardware="
ALLOCATED = "memory/peak_allocated_gib"


@dataclass(frozen=True)
class Ran:
    """A run: its job, and the GiB that the allocator had given at the most; None if it made no step."""

    name: str
    job: Job
    allocated: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN|hardware=X", help="folders of runs, and a hardware file")
    words = parser.parse_intermixed_args().words
    with reported_once(World.single(), trains=False):
        paths = [Path(word) for word in words if not word.startswith(HARDWARE)]
        if not paths:
            raise BadInput(Problem("words", "no run is named", "name folders below runs/"))
        print("\n".join(lines([read(path, [word for word in words if word.startswith(HARDWARE)]) for path in paths])))


def read(path: Path, more: Sequence[str]) -> Ran:
    try:
        folder = read_folder(path)
    except Unreadable as error:
        raise BadInput(Problem("run", str(error), "name folders below runs/")) from error
    words, world_size = shlex.split(folder.work.get("command", "")), folder.work.get("world_size")
    start = next((i for i, word in enumerate(words) if word in MAIN), None)
    if world_size is None or start is None:
        raise BadInput(Problem("run", f"{path} is not the folder of a run of {MAIN[0]}", "name folders below runs/"))
    kept = [word for word in words[start + 1 :] if not (more and word.startswith(HARDWARE))]
    job = of_plan(Plan(cli.configured([*kept, *more]), world_size))
    peaks = [value for record in folder.records if (value := number(record.get(ALLOCATED))) is not None]
    return Ran(path.name, job, max(peaks, default=None))


def lines(runs: Sequence[Ran]) -> Iterator[str]:
    width = max(len(run.name) for run in runs)
    yield f"{'GiB':<{width}}  predicted  measured    error  said to"
    logs, right = [], 0
    for run in runs:
        found = footprint(run.job)
        fits = says_fits(run.job, found)
        right += (fits is None) or fits == (run.allocated is not None)
        cells = f"{found.total / GiB:>9.2f}"
        if run.allocated is None:
            cells += f"{'ran out':>10}{'-':>9}"
        else:
            logs.append(math.log(found.total / GiB / run.allocated))
            cells += f"{run.allocated:>10.2f}{100 * logs[-1]:>+8.1f}%"
        yield f"{run.name:<{width}}  {cells}  {'-' if fits is None else 'fit' if fits else 'not fit'}"
    if logs:
        worst = max(logs, key=abs)
        yield f"mean error {100 * mean(map(abs, logs)):.1f} %, largest {100 * worst:+.1f} %, {len(logs)} run(s)"
    yield f"{right} of {len(runs)} are rightly said to fit or not"


def says_fits(job: Job, found: Footprint) -> bool | None:
    size = job.plan.config.hardware.memory_gib
    return None if size is None else found.total + reserve(job) <= size * GiB


if __name__ == "__main__":
    lasting()
    main()
