"""The training of a method: its overrides, and how it is run by the lab's own loop. Torch is not imported.

It has the model, text, batch and optimiser of the parent, other batches (train.seed is one more), and its own steps.
Its rate is a third of the parent's, as it starts from trained weights, but a student learns with the whole rate. Words
of the command line come last, so that they count: `strategy=dp nproc=2 train.micro_batch_size=4`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from launch.describe.memory import check_memory
from launch.local import check_machine, check_text, make_folder
from launch.start.environment import local_environment, source_path, torchrun_line
from launch.start.foreground import run_here
from train.command import cli, options
from train.command.overrides import with_quotes
from train.command.resources import path_of
from train.config.problems import BadInput, Problem, Reported
from train.config.rules.idle import written
from train.config.schema import Config
from train.record.run_files import entries, exists

RATE = 1 / 3  # of the parent's, where training goes on from trained weights
FROM_PARENT = ("model.", "data.", "optim.", "precision=")
FROM_TRAIN = ("seq_len", "global_batch_size", "clip_norm", "eval_batches")
OWN = {  # keys of the training that the tool sets, and what to use instead
    "train.steps": "retrain=STEPS",
    "train.qat": "method=qat_8da4w",
    "train.keep_zeros": "method=prune_2_4",
    "train.teacher": "method=distil",
    "checkpoint.weights": "RUN",
    "checkpoint.resume": "the same command line, which continues it",
    "checkpoint.every": "nothing: it is saved after its last step",
    "metrics.dir": "out=FOLDER",
}


class Stopped(Reported):
    """The training did not end by itself. It has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the training has ended with exit code {code}: the same command continues it")
        self.exit_code = code


@dataclass(frozen=True)
class Training:
    """`words`: its overrides. `folder`: its metrics.dir."""

    words: tuple[str, ...]
    nproc: int
    folder: Path

    @property
    def line(self) -> list[str]:
        return [*self.words, f"metrics.dir={with_quotes(str(self.folder))}"]

    def check(self) -> Config:
        """Raise BadInput for what cannot be trained."""
        config = cli.parse(cli.parser(options.LOCAL, ""), self.line)[0]
        cli.check(config, self.nproc)
        check_text(config, self.nproc)
        check_machine(config, self.nproc, None)
        check_memory(config, self.nproc)
        return config

    def finished(self) -> Path | None:
        """The directory of its run, if it is finished."""
        return next((run for run in entries(self.folder) if exists(run / "summary.json")), None)

    def run(self) -> Path:
        """Train in this terminal, unless it is done already, and give the run's directory. Call it from the main
        thread. Raises BadInput, and Stopped."""
        if (done := self.finished()) is not None:
            return done
        config = self.check()
        make_folder(config.metrics.dir)
        env, _ = local_environment(self.nproc, os.environ)
        code = run_here(torchrun_line(self.line, self.nproc), env, restarts=0, timeout_s=config.runtime.timeout_s)
        found = self.finished()
        if code or found is None:
            raise Stopped(code or 1)
        return found

    def start(self, log: IO[str]) -> subprocess.Popen[bytes]:
        """Start it as one process, with its output in a file."""
        assert self.nproc == 1
        command = [sys.executable, path_of("train/main.py"), *self.line]
        return subprocess.Popen(command, env=os.environ | source_path(), stdout=log, stderr=log)


def words_for(
    parent: Sequence[str], steps: int, more: Sequence[str], own: Sequence[str], *, whole_rate: bool, nproc: int
) -> tuple[str, ...]:
    """The overrides of a training. `parent`: those of its run. `more`: of the command line; `own`: of the method.
    Raises BadInput for one that the tool sets."""
    for word in more:
        if (key := word.lstrip("+").partition("=")[0]) in OWN:
            raise BadInput(Problem("own_key", f"{key} is set by the tool", f"use {OWN[key]}"))
    values = dict(word.partition("=")[::2] for word in parent)
    kept = [word for word in parent if word.startswith(FROM_PARENT)]
    kept += [f"train.{name}={values[f'train.{name}']}" for name in FROM_TRAIN if f"train.{name}" in values]
    groups = {"strategy": "single" if nproc == 1 else "dp", "optim": values["optim"]}
    chosen = {word.partition("=")[0] for word in more}
    first = [f"{group}={name}" for group, name in groups.items() if group not in chosen]
    rate = float(values["optim.lr"]) * (1.0 if whole_rate else RATE)
    set_here = [
        f"optim.lr={written(rate)}",
        f"train.seed={int(values['train.seed']) + 1}",
        f"train.steps={steps}",
        f"checkpoint.every={steps}",
    ]
    return (*first, *kept, *set_here, *own, *more)


def training_of(words: tuple[str, ...], nproc: int, out: Path) -> Training:
    """The training of these overrides below the directory of a compressed run. Other words get another folder, so that
    a directory that is used again does not take the result of other words."""
    digest = hashlib.sha256("\n".join([str(nproc), *words]).encode()).hexdigest()[:8]
    return Training(words, nproc, out / "training" / digest)
