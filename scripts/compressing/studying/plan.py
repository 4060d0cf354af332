"""What a study does: its command line, its parents, and the tasks of each. Torch is not imported."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.compressing.training import Training
from scripts.compressing.words import DISTIL, METHODS, PRUNE, PRUNE_2_4, QAT, QUANTISES, TRAINED_ON, Task
from train.command.option import Option, name, one_of, positive
from train.config.fields import MAX_STEPS
from train.config.problems import BadInput, Problem

TOOL = "scripts/compressing/study.py"
PARENT = "parent"  # what a method is applied to, if not to another model
LAST = 500  # steps between validations of a parent


def _numbers(text: str) -> tuple[int, ...] | None:
    return tuple(map(int, text.split(","))) if text.replace(",", "").isdigit() and ",," not in f",{text}," else None


def _methods(text: str) -> tuple[str, ...] | None:
    chosen = tuple(text.split(","))
    return chosen if set(chosen) <= set(METHODS) else None


def _steps(key: str, default: int) -> Option[int]:
    return Option(key, default, (TOOL,), *positive(MAX_STEPS), example=str(default), help="")


DEVICES = one_of("cpu", "cuda")
OPTIONS: dict[str, Option[Any]] = {
    "model": Option("model", "tiny", (TOOL,), "the name of a model", name, example="small", help=""),
    "seeds": Option("seeds", (1234, 1235, 1236), (TOOL,), "whole numbers", _numbers, example="1,2", help=""),
    "steps": _steps("steps", 3000),
    "retrain": _steps("retrain", 500),
    "distil": _steps("distil", 3000),
    "jobs": _steps("jobs", 1),
    "device": Option("device", "cpu", (TOOL,), *DEVICES, example="cuda", help=""),
    "speeds": Option("speeds", None, (TOOL,), *DEVICES, example="cpu", help=""),
    "only": Option("only", METHODS, (TOOL,), f"some of {', '.join(METHODS)}", _methods, example="nf4", help=""),
}


@dataclass(frozen=True)
class Study:
    folder: Path
    model: str
    seeds: tuple[int, ...]
    steps: int
    retrain: int
    distil: int
    jobs: int
    device: str
    speeds: str | None
    only: tuple[str, ...]
    words: tuple[str, ...]
    begun: float

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.0f} s] {text}", flush=True)

    def parent(self, seed: int, steps: int) -> Training:
        words = (
            *("strategy=single", f"model={self.model}", f"train.seed={seed}", "train.seq_len=512"),
            *(f"train.steps={steps}", f"train.eval_every={LAST}", f"checkpoint.every={steps}", *self.everywhere),
        )
        return Training(words, 1, self.folder / f"{self.model}-{seed}" / f"parent-{steps}")

    @property
    def everywhere(self) -> tuple[str, ...]:
        quiet = ("metrics.tensorboard=false", "metrics.profile_every=0", f"runtime.device={self.device}")
        return (*quiet, *self.words)

    def tasks(self, run: Path) -> Iterator[Task]:
        """Every method with its options, those that are compared with others after these."""
        every: list[tuple[str, dict[str, Any]]] = [(TRAINED_ON, {"retrain": self.retrain})]
        every += [(method, {}) for method in QUANTISES]
        for score in ("magnitude", "wanda"):
            how = {"score": score} | ({"calibration": 32} if score == "wanda" else {})
            for more in ({}, {"retrain": self.retrain}):
                every += [(PRUNE_2_4, {**how, **more}), (PRUNE, {"score": score, "sparsity": 0.5, **how, **more})]
        every += [(QAT, {"retrain": self.retrain})]
        every += [(DISTIL, {"init": init, "kl": kl, "retrain": self.distil})
                  for init in ("scratch", "teacher") for kl in (False, True)]  # fmt: skip
        for method, options in every:
            if method in self.only:
                yield Task(run, method, options, overrides=self.training_words, device=self.device)

    @property
    def training_words(self) -> tuple[str, ...]:
        """The overrides of trainings that go on from a parent, whose config has the model and its text."""
        groups = ("model", "data", "optim")
        others = (word for word in self.everywhere if word.partition("=")[0].split(".")[0] not in groups)
        return ("train.eval_every=0", *others)


def read(argv: Sequence[str]) -> Study:
    """The study of a command line. Raises BadInput."""
    folder, words = Path(argv[0]), [*argv[1:]]
    found = {key: option.pop(words) for key, option in OPTIONS.items()}
    if bad := [word for word in words if "=" not in word]:
        raise BadInput(Problem("word", f"{bad[0]} is no word of this tool", "use key=value, and see --help"))
    if found["steps"] % LAST or found["steps"] < 2 * LAST:
        message = f"steps={found['steps']} is not {2 * LAST} or more in whole {LAST}s, after which losses are compared"
        raise BadInput(Problem("steps", message, "use steps=3000, for example"))
    return Study(folder, words=tuple(words), begun=time.monotonic(), **found)
