"""What `launch.doctor` finds: a finding for each thing that was examined, with its fix where one is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # a run starts, but some runs fail, are slow, or leave something behind
    ERROR = "error"  # no run starts, or none of the kind that the message names


@dataclass(frozen=True)
class Finding:
    """`subject`: what was examined, in a few words. `message`: the value and, unless it is ok, the rule. `fix`: what to
    do; empty if it is ok. `values`: the same as numbers and texts, for programs."""

    subject: str
    level: Level
    message: str
    fix: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def ok(subject: str, message: str, **values: Any) -> Finding:
    return Finding(subject, Level.OK, message, values=values)


def warning(subject: str, message: str, fix: str, **values: Any) -> Finding:
    return Finding(subject, Level.WARNING, message, fix, values)


def error(subject: str, message: str, fix: str, **values: Any) -> Finding:
    return Finding(subject, Level.ERROR, message, fix, values)


def guarded(subject: str, examine: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of `examine`. An exception becomes a finding, so that the other examinations still take place."""
    try:
        return examine()
    except ImportError as why:
        fix = "install the lab's packages again: python -m pip install -e . in its source tree"
        return [error(subject, f"a package that a run needs cannot be imported ({why})", fix)]
    except Exception as why:
        fix = "look at this part of the machine yourself; the other findings do not depend on it"
        return [warning(subject, f"this could not be examined ({type(why).__name__}: {why})", fix)]
