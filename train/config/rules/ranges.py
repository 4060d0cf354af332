"""Values outside the range of their own field, and invalid degrees. These are found before rules are checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from train.config.fields import MAX_RANKS
from train.config.schema import Config

LONGEST = 60  # characters of a value that a message shows


@dataclass(frozen=True)
class OutOfRange:
    """A value out of range. `override`: a valid value, with which the rules are checked."""

    rule: str
    message: str
    override: str


def out_of_range(config: Config) -> Iterator[OutOfRange]:
    """Numbers outside the range that their field declares, then invalid degrees."""
    for group in dataclasses.fields(config):
        section = getattr(config, group.name)
        if not dataclasses.is_dataclass(section):
            continue
        for field in dataclasses.fields(section):
            value, bounds = getattr(section, field.name), field.metadata.get("bounds")
            if bounds and isinstance(value, int | float) and not _inside(value, bounds):
                key = f"{group.name}.{field.name}"
                limits = [
                    f"{text} {_plain(bounds[name])}" for name, text, _ in _COMPARISONS if bounds[name] is not None
                ]
                message = f"{key}={shortened(value)} is out of range (a finite value {' and '.join(limits)})"
                yield OutOfRange(f"range of {key}", message, f"{key}={_instead(field)}")
    yield from _bad_degrees(config)


def too_many_processes(world_size: int) -> OutOfRange | None:
    if world_size <= MAX_RANKS:
        return None
    message = f"nproc={shortened(world_size)} is more than {MAX_RANKS:,} processes, which is the maximum"
    return OutOfRange("range of nproc", message, "nproc=1")


def shortened(value: object) -> str:
    """A value for a message, cut if it is long."""
    if isinstance(value, int) and abs(value) > 10**LONGEST:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _instead(field: dataclasses.Field[Any]) -> str:
    value: Any = field.default if field.default != MISSING else field.metadata["example"]
    return "null" if value is None else _plain(value)


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


_COMPARISONS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("ge", ">=", lambda x, y: x >= y),
    ("gt", ">", lambda x, y: x > y),
    ("le", "<=", lambda x, y: x <= y),
    ("lt", "<", lambda x, y: x < y),
)


def _inside(value: float, bounds: Any) -> bool:
    return (isinstance(value, int) or math.isfinite(value)) and all(
        compare(value, bounds[name]) for name, _, compare in _COMPARISONS if bounds[name] is not None
    )


def _bad_degrees(config: Config) -> Iterator[OutOfRange]:
    """A degree is a positive number of ranks. One axis may have -1 instead, for all ranks that are left."""
    axes = config.strategy.mesh_axes()
    free = [axis for axis, degree in axes.items() if degree == -1]
    for axis, degree in {**axes, "ep": config.strategy.expert_degree() or 1}.items():
        key = f"strategy.{axis}"
        mended = f"{key}={1 if free else -1}"
        if degree < 1 and degree != -1 and axis != "ep":
            message = (
                f"{key}={shortened(degree)} is not a valid degree (a positive number, or -1 for all that are left)"
            )
            yield OutOfRange(f"degree of {axis}", message, mended)
            free = [*free, axis]
        elif degree > MAX_RANKS:
            message = f"{key}={shortened(degree)} is out of range (a degree is at most {MAX_RANKS:,})"
            yield OutOfRange(f"range of {key}", message, mended)
            free = [*free, axis]
    free = [axis for axis, degree in axes.items() if degree == -1]
    if len(free) > 1:
        names = " and ".join(f"strategy.{axis}" for axis in free)
        message = f"{names} are both -1, but only one axis can take the ranks that are left"
        yield OutOfRange("one_free_axis", message, " ".join(f"strategy.{axis}=1" for axis in free[1:]))
