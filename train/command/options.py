"""The options of the tools, such as `nproc=4`, which are not keys of the config. Each is declared only here.

The tools read them, and `--help` and docs/configuration.md show them. If an option is given to a wrong tool, the
message names the tools that have it. Torch is not imported.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from train.config.fields import MAX_RANKS, MAX_SEQUENCES, MAX_STEPS
from train.config.problems import BadInput, Problem
from train.config.rules.ranges import shortened

LOCAL, EXPLAIN, SWEEP = "python -m launch.local", "python -m launch.explain", "python -m launch.sweep"
DOCTOR = "python -m launch.doctor"
VERIFY, BENCH_STEP = "python scripts/verify.py", "scripts/bench_step.py"
SOAK = "python scripts/soak.py"
MAX_RESTARTS = 10_000

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """An option. `read` returns the value of a text, or None if the text is wrong. `must` completes the message "must
    be …"."""

    name: str
    default: T
    tools: tuple[str, ...]
    must: str
    read: Callable[[str], T | None]
    example: str
    help: str
    unset: str = ""  # the meaning of None as the default, for --help

    def pop(self, argv: list[str]) -> T:
        """Remove every `name=value` from argv and return the last value. Raises BadInput if one of them is wrong."""
        given = [word for word in argv if word.startswith(f"{self.name}=")]
        argv[:] = [word for word in argv if word not in given]
        return [self.default, *(self.value(word) for word in given)][-1]

    def value(self, word: str) -> T:
        """The value of `name=value`. Raises BadInput if it is wrong."""
        text = word.partition("=")[2]
        value = self.read(text)
        if value is None:
            message = f"{self.name}={shortened(text)} is not valid: {self.name} must be {self.must}"
            raise BadInput(Problem(self.name, message, f"use {self.name}={self.example}, for example"))
        return value

    @property
    def shown_default(self) -> str:
        return self.unset or str(self.default).lower()


def of(tool: str) -> list[Option[Any]]:
    """The options of a tool."""
    return [option for option in OPTIONS if tool in option.tools]


def named(name: str) -> Option[Any] | None:
    return next((option for option in OPTIONS if option.name == name), None)


def _positive(most: int) -> tuple[str, Callable[[str], int | None]]:
    def read(text: str) -> int | None:
        # the length is checked first, as Python refuses to convert thousands of digits
        right = re.fullmatch(r"[1-9][0-9]*", text) and len(text) <= len(str(most)) and int(text) <= most
        return int(text) if right else None

    return f"a positive integer, at most {most:,}", read


def _count(most: int) -> tuple[str, Callable[[str], int | None]]:
    read = _positive(most)[1]
    return f"a whole number from 0 to {most:,}", lambda text: 0 if text == "0" else read(text)


def _one_of(*values: str) -> tuple[str, Callable[[str], str | None]]:
    return f"{', '.join(values[:-1])} or {values[-1]}", lambda text: text if text in values else None


def _times(text: str) -> tuple[float, ...] | None:
    parts = text.split(",")
    right = all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", part) and float(part) > 0 for part in parts)
    return tuple(map(float, parts)) if right else None


_TRUE_OR_FALSE = ("true or false", {"true": True, "false": False}.get)

NPROC: Option[int] = Option(
    "nproc",
    1,
    (LOCAL, EXPLAIN, SWEEP, VERIFY, DOCTOR, SOAK),
    *_positive(MAX_RANKS),
    example="4",
    help="The number of processes; launch.explain and launch.sweep take several, as nproc=2,4.",
)
PORT: Option[int | None] = Option(
    "port",
    None,
    (LOCAL,),
    *_positive(65_535),
    example="29500",
    help="The port of torchrun's store on this machine.",
    unset="a free one",
)
RESTARTS: Option[int] = Option(
    "restarts",
    0,
    (LOCAL,),
    *_count(MAX_RESTARTS),
    example="3",
    help="How often all ranks are started again after one of them has failed.",
)
FORCE: Option[bool] = Option(
    "force",
    False,
    (LOCAL, SWEEP, VERIFY),
    *_TRUE_OR_FALSE,
    example="true",
    help="Runs are started even if they do not fit in memory.",
)
BATCH: Option[str] = Option(
    "batch",
    "global",
    (SWEEP,),
    *_one_of("global", "micro", "best"),
    example="micro",
    help="How the points are made comparable. global: the global batch is as given. micro: train.micro_batch_size is "
    "as given, and the global batch is scaled so that each data rank has as many microbatches as in the first point. "
    "best: as micro, with the largest micro batch of each point that runs, which short runs find.",
)
MAX_MICRO_BATCH_SIZE: Option[int | None] = Option(
    "max_micro_batch_size",
    None,
    (SWEEP,),
    *_positive(MAX_SEQUENCES),
    example="64",
    help="The largest micro batch that batch=best tries, in sequences.",
    unset="64 on a CPU; on a GPU, its memory",
)
SKIP_INVALID: Option[bool] = Option(
    "skip_invalid",
    False,
    (SWEEP,),
    *_TRUE_OR_FALSE,
    example="true",
    help="Points that cannot be run are left out, and the others are run.",
)
FRESH: Option[bool] = Option(
    "fresh",
    False,
    (SWEEP,),
    *_TRUE_OR_FALSE,
    example="true",
    help="The results of an earlier start of the same command are not used; without this, that sweep is continued.",
)
LOCATE: Option[bool | None] = Option(
    "locate",
    None,
    (VERIFY,),
    *_TRUE_OR_FALSE,
    example="true",
    help="Whether to run a strategy once more and look for the first wrong result, comparing every module's output and "
    "its gradient.",
    unset="only where a strategy differs",
)
STEPS: Option[int] = Option(
    "steps",
    40,
    (BENCH_STEP,),
    *_positive(MAX_STEPS),
    example="40",
    help="The number of timed steps of each loop.",
)
MINUTES: Option[tuple[float, ...]] = Option(
    "minutes",
    (10.0,),
    (SOAK,),
    "a number of minutes",
    lambda text: None if "," in text else _times(text),
    example="20",
    help="How long each strategy is trained without kills; the runs with kills make as many steps.",
    unset="10",
)
MTBF_S: Option[tuple[float, ...]] = Option(
    "mtbf_s",
    (60.0,),
    (SOAK,),
    "one or several numbers of seconds",
    _times,
    example="300",
    help="The mean time between two kills, in seconds; several values, as 60,300, make a run each.",
    unset="60",
)
LIMIT_S: Option[int] = Option(
    "limit_s",
    10,
    (DOCTOR,),
    *_positive(3600),
    example="60",
    help="How long the doctor may take, in seconds. What has not answered by then is an error.",
)
OPTIONS: tuple[Option[Any], ...] = (
    NPROC,
    PORT,
    RESTARTS,
    FORCE,
    BATCH,
    MAX_MICRO_BATCH_SIZE,
    SKIP_INVALID,
    FRESH,
    LOCATE,
    STEPS,
    MINUTES,
    MTBF_S,
    LIMIT_S,
)
