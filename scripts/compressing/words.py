"""The command line of scripts/compress.py: the methods, their options, and what is trained. Torch is not imported."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.compressing.record import label, shown
from train.command import options
from train.command.option import MAX_TEXT, TRUE_OR_FALSE, Option, amount, count, one_of, positive, text
from train.config.fields import MAX_SEQUENCES, MAX_STEPS, MAX_TOKENS
from train.config.problems import BadInput, Problem
from train.config.rules.ranges import shortened

TOOL = "scripts/compress.py"
TRAINED_ON, DISTIL, QAT = "trained_on", "distil", "qat_8da4w"
PRUNE_2_4, PRUNE = "prune_2_4", "prune_unstructured"
PRUNES = (PRUNE_2_4, PRUNE)
QUANTISES = ("int8_weight_only", "int8_dynamic", "int4_weight_only", "8da4w", "llm_int8", "nf4")
METHODS = (*QUANTISES, QAT, *PRUNES, DISTIL, TRAINED_ON)
MUST_TRAIN, MAY_TRAIN = (QAT, DISTIL, TRAINED_ON), PRUNES


def share(word: str) -> float | None:
    value = amount(word)
    return value if value is not None and value < 1 else None


METHOD: Option[str | None] = Option(
    "method", None, (TOOL,), *one_of(*METHODS), example="int8_weight_only", help="What makes the model smaller."
)
RETRAIN: Option[int] = Option(
    "retrain", 0, (TOOL,), *count(MAX_STEPS), example="500", help="The optimiser steps of the training."
)
SCORE: Option[str] = Option(
    "score", "wanda", (TOOL,), *one_of("magnitude", "wanda"), example="wanda", help="What weights are pruned by."
)
SPARSITY: Option[float] = Option(
    "sparsity",
    0.5,
    (TOOL,),
    "a number between 0 and 1",
    share,
    example="0.5",
    help="The share of weights that become 0.",
)
CALIBRATION: Option[int] = Option(
    "calibration", 32, (TOOL,), *positive(MAX_SEQUENCES), example="32", help="The sequences for Wanda's score."
)
INIT: Option[str] = Option(
    "init", "teacher", (TOOL,), *one_of("teacher", "scratch"), example="teacher", help="What a student starts from."
)
KL: Option[bool] = Option(
    "kl", True, (TOOL,), *TRUE_OR_FALSE, example="true", help="A student learns the teacher's logits."
)
OUT: Option[str | None] = Option(
    "out",
    None,
    (TOOL,),
    f"the name of a folder, at most {MAX_TEXT:,} characters",
    text,
    example="runs/small",
    help="The new run.",
)
DEVICE: Option[str] = Option(
    "device", "cpu", (TOOL,), *one_of("cpu", "cuda"), example="cuda", help="Where losses and speeds are measured."
)
TOKENS: Option[int] = Option(
    "tokens",
    64,
    (TOOL,),
    *positive(MAX_TOKENS),
    example="64",
    help="The tokens that are generated to measure the speed.",
)
OF_METHODS: dict[Option[Any], tuple[str, ...]] = {  # the options that only some methods read, in the order of a label
    SCORE: PRUNES,
    SPARSITY: (PRUNE,),
    CALIBRATION: PRUNES,
    INIT: (DISTIL,),
    KL: (DISTIL,),
    RETRAIN: (*MUST_TRAIN, *MAY_TRAIN),
}
OWN: tuple[Option[Any], ...] = (METHOD, OUT, DEVICE, TOKENS, *OF_METHODS)


@dataclass(frozen=True)
class Task:
    """`options`: what the method reads, by name. `nproc`, `overrides`: of the training. `out`: the new directory;
    None for the default name."""

    run: Path
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    nproc: int = 1
    overrides: tuple[str, ...] = ()
    out: Path | None = None
    device: str = "cpu"
    tokens: int = TOKENS.default

    @property
    def steps(self) -> int:
        """The optimiser steps of its training; 0 if it trains nothing."""
        steps: int = self.options.get("retrain", 0)
        return steps


def words_of(task: Task) -> list[str]:
    """The words of a command line that gives this task."""
    given = {"method": task.method, **task.options}
    given |= {} if task.nproc == options.NPROC.default else {"nproc": task.nproc}
    given |= {} if task.out is None else {"out": task.out}
    given |= {} if task.device == DEVICE.default else {"device": task.device}
    given |= {} if task.tokens == TOKENS.default else {"tokens": task.tokens}
    return [str(task.run), *(f"{name}={shown(value)}" for name, value in given.items()), *task.overrides]


def directory(task: Task, run: Path) -> Path:
    """The new directory: beside the run, with the name of the run and of what is done. `run`: its directory."""
    if task.out is not None:
        return task.out
    name = re.sub(r"[^a-z0-9._]+", "-", label(task.method, task.options))
    trained = [str(task.nproc), *task.overrides]
    digest = f"-{hashlib.sha256(chr(10).join(trained).encode()).hexdigest()[:6]}" if trained != ["1"] else ""
    return run.with_name(f"{run.name}-{name}{digest}")


def read(run: str, words: Sequence[str]) -> Task:
    """The task of a command line. Raises BadInput."""
    argv = [*words]
    typed = {word.partition("=")[0] for word in argv}
    method = _method(argv)
    given = {one: one.pop(argv) for one in OWN if one is not METHOD}
    nproc = options.NPROC.pop(argv)
    for one, methods in OF_METHODS.items():
        if one.name in typed and method not in methods:
            message = f"{one.name} is not read by method={method}"
            raise BadInput(Problem("unread", message, f"leave it out, or use {_listed(methods)}"))
    mine = {one.name: given[one] for one, methods in OF_METHODS.items() if method in methods}
    if mine.get("score") == "magnitude":
        _refuse(typed, "calibration", "score=magnitude", "use score=wanda")
    mine = {name: value for name, value in mine.items() if _read(name, mine)}
    if method in MUST_TRAIN and not given[RETRAIN]:
        raise BadInput(
            Problem("retrain", f"method={method} trains, but no steps are given", "use retrain=500, for example")
        )
    if "retrain" not in mine and (argv or nproc != options.NPROC.default):
        word = argv[0] if argv else f"nproc={nproc}"
        message = f"{shortened(word)} is about a training, but {_command(method)} trains nothing"
        fix = "leave it out" if method in QUANTISES else "use retrain=500, for example, or leave it out"
        raise BadInput(Problem("unread", message, fix))
    out = None if given[OUT] is None else Path(given[OUT])
    return Task(Path(run), method, mine, nproc, tuple(argv), out, given[DEVICE], given[TOKENS])


def _read(name: str, mine: dict[str, Any]) -> bool:
    """Whether an option has an effect beside the others: 0 steps are none, and magnitudes need no calibration."""
    if name == "calibration":
        return mine["score"] == "wanda"
    return name != "retrain" or mine["retrain"] > 0


def _refuse(typed: set[str], name: str, why: str, fix: str) -> None:
    if name in typed:
        raise BadInput(Problem("unread", f"{name} is not read with {why}", f"leave it out, or {fix}"))


def _command(method: str) -> str:
    return f"method={method}" + (" without retrain=STEPS" if method in MAY_TRAIN else "")


def _method(argv: list[str]) -> str:
    for word in argv:
        name, equals, value = word.partition("=")
        if not equals:
            raise BadInput(
                Problem("word", f"{shortened(word)} is no word of this tool", "use key=value, and see --help")
            )
        if name == "method" and value not in METHODS:
            near = difflib.get_close_matches(value, METHODS, n=1)
            fix = f"use method={near[0]}" if near else f"use one of {', '.join(METHODS)}"
            raise BadInput(Problem("method", f"method={shortened(value)} is not known", fix))
    method = METHOD.pop(argv)
    if method is None:
        raise BadInput(Problem("method", "no method is given", f"use method=NAME, one of {', '.join(METHODS)}"))
    return method


def _listed(names: Sequence[str]) -> str:
    return " or ".join(f"method={name}" for name in names)
