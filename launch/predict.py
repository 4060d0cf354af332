"""Predict finished runs, and print it beside what was measured: python -m launch.predict RUN … hardware=NAME,NAME

For each run of train/main.py it predicts the step from the command that is stored with the run, once for each hardware
file, and prints its parts beside those of the run's recorded step, in milliseconds. The last lines have the mean error
|log(predicted / measured)| of the time of a step for each hardware file. More overrides are added to every run's own.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from launch.checking import beside, records
from launch.checking.records import Measured
from train.command import cli
from train.command.planning import constants
from train.command.planning.job import missing_figures, of_plan
from train.command.planning.quantities import quantities
from train.command.planning.step_time import step_time
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.world import World
from train.record.run_files import Unreadable

HARDWARE = "hardware="


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="RUN|override", help="folders of runs, then hardware=A,B")
    words = parser.parse_intermixed_args().words
    with reported_once(World.single(), trains=False):
        runs = [read(Path(word)) for word in words if "=" not in word]
        named = [word.removeprefix(HARDWARE) for word in words if word.startswith(HARDWARE)]
        files = [name for names in named for name in names.split(",")]
        more = [word for word in words if "=" in word and not word.startswith(HARDWARE)]
        if not runs or not files or not all(files):
            raise BadInput(Problem("words", "no run, or no hardware=NAME", "name both, as --help shows"))
        print("\n".join(lines(runs, files, more)))


def read(path: Path) -> Measured:
    try:
        return records.read(path)
    except Unreadable as error:
        raise BadInput(Problem("run", str(error), "name folders below runs/")) from error


def lines(runs: Sequence[Measured], files: Sequence[str], more: Sequence[str]) -> Iterator[str]:
    errors: dict[str, list[float]] = {name: [] for name in files}
    for run in runs:
        found = {name: prediction(run, name, more) for name in files}
        yield f"{run.path.name} on {run.world_size} x {run.device}; {run.corrected}"
        yield from beside.table(run, found)
        for name, parts in found.items():
            errors[name].append(math.log(sum(parts.values()) / run.step_ms))
        yield ""
    for name, logs in errors.items():
        size, bias = 100 * mean(map(abs, logs)), 100 * mean(logs)
        yield f"{name}: mean error of the step {size:.1f} %, bias {bias:+.1f} %, {len(logs)} run(s)"


def prediction(run: Measured, hardware: str, more: Sequence[str]) -> dict[str, float]:
    """The parts of a step in milliseconds. Raises BadInput if the hardware file lacks a figure that the run needs."""
    kept = [word for word in run.overrides if not word.startswith(HARDWARE)]
    config = cli.configured([*kept, f"{HARDWARE}{hardware}", *more])
    cli.check(config, run.world_size)
    job = of_plan(Plan(config, run.world_size))
    if missing := missing_figures(job):
        message = f"hardware={hardware} has no {', '.join(missing)}, which {run.path.name} needs"
        fix = "measure it with scripts/matmul.py, under torchrun for messages, or use another file"
        raise BadInput(Problem("hardware", message, fix))
    return records.predicted(step_time(quantities(job), constants.load()))


if __name__ == "__main__":
    lasting()
    main()
