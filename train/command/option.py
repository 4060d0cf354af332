"""An option of a tool, such as `nproc=4`, and how its value is read. Torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from train.config.problems import BadInput, Problem
from train.config.rules.ranges import shortened

MAX_TEXT = 1_000  # characters of a path
MOST = 1e30  # of an amount

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


def positive(most: int) -> tuple[str, Callable[[str], int | None]]:
    def read(text: str) -> int | None:
        # the length is checked first, as Python refuses to convert thousands of digits
        right = re.fullmatch(r"[1-9][0-9]*", text) and len(text) <= len(str(most)) and int(text) <= most
        return int(text) if right else None

    return f"a positive integer, at most {most:,}", read


def count(most: int) -> tuple[str, Callable[[str], int | None]]:
    read = positive(most)[1]
    return f"a whole number from 0 to {most:,}", lambda text: 0 if text == "0" else read(text)


def one_of(*values: str) -> tuple[str, Callable[[str], str | None]]:
    before = f"{', '.join(values[:-1])} or " if len(values) > 1 else ""
    return f"{before}{values[-1]}", lambda text: text if text in values else None


def times(text: str) -> tuple[float, ...] | None:
    parts = text.split(",")
    right = all(re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", part) and float(part) > 0 for part in parts)
    return tuple(map(float, parts)) if right else None


def amount(text: str) -> float | None:
    right = re.fullmatch(r"[0-9]{1,20}(\.[0-9]{1,6})?([eE]\+?[0-9]{1,2})?", text) and 0 < float(text) <= MOST
    return float(text) if right else None


def text(text: str) -> str | None:
    return text if 0 < len(text) <= MAX_TEXT and text.isprintable() else None


def name(text: str) -> str | None:
    return text if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,60}", text) else None


TRUE_OR_FALSE = ("true or false", {"true": True, "false": False}.get)
