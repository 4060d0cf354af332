"""The trainings of a study: processes of train/main.py, several at once. Torch is not imported."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.compressing.studying.plan import LAST, Study
from scripts.compressing.training import Training
from train.config.problems import Reported
from train.measure.results import VALIDATION_LOSS
from train.record.run_folder import read_folder

LEAST_FALL = 0.01  # a parent is trained until its validation loss falls by less than this in LAST steps
POLL_S = 0.2
TAIL = 2000  # characters of a log that an error shows


class Failed(Reported):
    """A training that did not end by itself."""


def train(study: Study, trainings: Sequence[tuple[str, Training]]) -> None:
    """Run them, `jobs` at a time. Each has its output in a file `log` beside its run. Raises Failed, and ends the
    others."""
    waiting = [*trainings]
    running: dict[subprocess.Popen[bytes], tuple[str, Training, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < study.jobs:
                name, training = waiting.pop(0)
                training.folder.mkdir(parents=True, exist_ok=True)
                with (training.folder / "log").open("a") as log:
                    running[training.start(log)] = (name, training, time.monotonic())
            time.sleep(POLL_S)
            for process in [one for one in running if one.poll() is not None]:
                name, training, since = running.pop(process)
                if process.returncode or training.finished() is None:
                    said = (training.folder / "log").read_text(errors="replace")[-TAIL:]
                    raise Failed(f"{name}: the training has ended with exit code {process.returncode}:\n{said}")
                study.say(f"{name}: trained in {time.monotonic() - since:.0f} s")
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def train_parents(study: Study) -> dict[int, Path]:
    """The runs of the parents by their seeds, each trained for as many steps as it needs."""
    steps = dict.fromkeys(study.seeds, study.steps)
    found: dict[int, Path] = {}
    while missing := [seed for seed in study.seeds if seed not in found]:
        trainings = {seed: study.parent(seed, steps[seed]) for seed in missing}
        named = [
            (f"{seed} parent, {steps[seed]} steps", one) for seed, one in trainings.items() if one.finished() is None
        ]
        train(study, named)
        for seed, training in trainings.items():
            path = training.finished()
            assert path is not None
            losses = {record["step"]: record[VALIDATION_LOSS] for record in read_folder(path).records
                      if record.get(VALIDATION_LOSS)}  # fmt: skip
            last, before = losses[steps[seed]], losses[steps[seed] - LAST]
            study.say(f"{seed} parent: validation loss {before:.4f} -> {last:.4f} in the last {LAST} steps")
            if last > (1 - LEAST_FALL) * before:
                found[seed] = path
            else:
                steps[seed] += 2 * LAST
    return {seed: found[seed] for seed in study.seeds}
