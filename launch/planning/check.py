"""The planner checked on the machine at hand: layouts that it ranks first, and some that lose, proven, run and timed.

Each layout is first proven by scripts/verify.py, then run by launch.sweep with a recorded step. The prediction stands
beside the measurement, part by part (launch/checking/records.py).
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.checking import beside, records
from launch.checking.records import Measured
from launch.planning.answer import Answer, words_of
from train.command.overrides import with_quotes
from train.command.planning.search.pricer import Priced
from train.command.planning.search.words import shown
from train.command.resources import ROOT, path_of
from train.config.problems import EXIT_STOPPED, BadInput, Problem, Reported
from train.record.run_files import Unreadable

LOSERS = 2  # layouts that are checked beside the best: of those that were replayed, the middle one and the slowest
STEPS = {"train.steps": 40, "train.eval_every": 0, "train.eval_batches": 1, "checkpoint.every": 0}
LEAST, MOST_OTHER = 0.03, 0.05  # of the step: by how much parts may miss it, and the most that "other" should be


class NotChecked(Reported):
    """A layout could not be proven or run."""

    exit_code = EXIT_STOPPED


@dataclass(frozen=True)
class Checked:
    place: int
    priced: Priced
    measured: Measured


def check(answer: Answer, count: int) -> Iterator[str]:
    """Lines, each layout's as soon as it has run. Raises NotChecked, and BadInput if no layout can be trained."""
    places = trainable(answer)
    found = []
    for place in (places[i] for i in picked(len(places), count)):
        one = answer.best[place]
        yield f"layout {place + 1}: {one.layout.name}, {shown(one.layout)}"
        found.append(Checked(place + 1, one, _measured(answer, one, place + 1)))
        yield from table(found[-1])
    yield from verdict(found)


def trainable(answer: Answer) -> list[int]:
    """The places of the layouts that are priced in the precision of the config. The lab does not train in others."""
    precision = answer.base.config.precision.value
    found = [place for place, one in enumerate(answer.best) if one.quantities.job.products == precision]
    if not found:
        message = f"check= trains in {precision}, but no layout was priced in it"
        raise BadInput(Problem("check", message, f"add precision={precision}, or leave check= out"))
    return found


def picked(available: int, count: int) -> list[int]:
    """The places of the first layouts and of the losers."""
    losers = [available // 2, available - 1][-LOSERS:]
    return sorted({*range(min(count, available)), *(place for place in losers if place >= count)})


def _measured(answer: Answer, one: Priced, place: int) -> Measured:
    config, nproc = answer.base.config, answer.base.world_size
    folder = Path(config.metrics.dir) / "planned" / str(place)
    typed = [word for word in words_of(answer, one) if not word.startswith(("metrics.dir=", *STEPS))]
    words = [f"nproc={nproc}", *typed]
    _run([path_of("scripts/verify.py")], words, folder, "verify.log")
    steps = [f"{key}={value}" for key, value in STEPS.items()]
    own = [*steps, f"metrics.dir={with_quotes(str(folder))}", "metrics.tensorboard=false"]
    _run(["-m", "launch.sweep"], [*words, *own, "fresh=true"], folder, "sweep.log")
    runs = sorted((path.parent for path in folder.glob("*/summary.json")), key=lambda run: run.stat().st_mtime)
    if not runs:
        raise NotChecked(f"{folder} has no finished run: see sweep.log there")
    try:
        return records.read(runs[-1])
    except Unreadable as error:
        raise NotChecked(f"{runs[-1]} cannot be read: {error}") from error


def _run(tool: Sequence[str], words: Sequence[str], folder: Path, log: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    line = [sys.executable, *tool, *words]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (folder / log).open("w") as file:
        code = subprocess.run(line, env=env, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        raise NotChecked(f"{shlex.join([*tool, *words])} ended with {code}: see {folder / log}")


def table(one: Checked) -> list[str]:
    """Milliseconds by part, measured and predicted, and what is not as it should be."""
    parts, step_ms = one.measured.parts, one.measured.step_ms
    missed, other = abs(sum(parts.values()) / step_ms - 1), parts.get("other", 0.0) / step_ms
    notes = f"  proven equal to one device; {one.measured.corrected}"
    notes += "" if missed <= LEAST else f"; they miss the step by {100 * missed:.1f} %"
    notes += "" if other <= MOST_OTHER else f"; other is {100 * other:.1f} % of the step"
    return [*beside.table(one.measured, {"predicted": records.predicted(one.priced.time)}), notes]


def verdict(found: Sequence[Checked]) -> list[str]:
    errors = [math.log(1e3 * one.priced.seconds / one.measured.step_ms) for one in found]
    mean = 100 * sum(map(abs, errors)) / len(errors)
    fastest = min(found, key=lambda one: one.measured.step_ms)
    first = found[0]
    regret = 100 * (1 - fastest.measured.step_ms / first.measured.step_ms)
    return [
        f"mean error of the step {mean:.1f} %, bias {100 * sum(errors) / len(errors):+.1f} %, {len(found)} layouts",
        f"the fastest is layout {fastest.place}; the first loses {regret:.1f} % against it",
    ]
