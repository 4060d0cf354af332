"""A rule as data: its name, its reason in a sentence, its check, and the fixes that the check proposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.config.plan import Plan


@dataclass(frozen=True)
class Finding:
    """A broken rule. `message` gives the value and the rule.

    `fixes` are lines of overrides, best first, which may also name `nproc`: `validate` tries them, alone and with those
    of other broken rules, and offers what leaves no problem at all, so that a check need not know of the other rules.
    `otherwise` says in words what to do where nothing was found: it names no override, as none was tried.
    """

    message: str
    fixes: tuple[str, ...] = ()
    otherwise: str = "use another strategy"


@dataclass(frozen=True)
class Rule:
    """`check` returns None where the plan keeps the rule. It sees only values within their fields' own ranges."""

    name: str
    reason: str
    check: Callable[[Plan], Finding | None]


def divisors(value: int, limit: int = 1024) -> list[int]:
    return [d for d in range(1, min(value, limit) + 1) if value % d == 0]


def below(degree: int) -> list[int]:
    """Smaller degrees to try: the nearest ones, then halves."""
    halves = [degree >> i for i in range(1, degree.bit_length())]
    return [*dict.fromkeys([*range(degree - 1, max(degree - 9, 0), -1), *halves])]


def nearest(options: list[int], to: int) -> list[int]:
    """`options` by their distance from `to`; the smaller first of two at the same distance."""
    return sorted(options, key=lambda option: (abs(option - to), option))


def degree_fixes(plan: Plan, axis: str, degrees: list[int]) -> tuple[str, ...]:
    """Lines that give `axis` one of `degrees`: by the key alone, with the processes to match, or by processes alone."""
    lines = []
    for degree in degrees:
        nproc = plan.world_size // plan.degrees[axis] * degree
        if plan.axes.get(axis) == -1:
            lines += [f"nproc={nproc}"]
        lines += [f"strategy.{axis}={degree}", f"strategy.{axis}={degree} nproc={nproc}"]
    return tuple(lines)


def divides(axis: str, name: str, value: Callable[[Plan], int]) -> Callable[[Plan], Finding | None]:
    """The check that the degree of `axis` divides `value`, which the key `name` gives; 0 is divided by every degree."""

    def check(plan: Plan) -> Finding | None:
        degree, found = plan.degrees[axis], value(plan)
        if found % degree == 0:
            return None
        message = f"{name}={found} is not divisible by strategy.{axis}={degree}"
        fixes = degree_fixes(plan, axis, nearest(divisors(found), degree))
        return Finding(message, fixes, f"use a smaller strategy.{axis}")

    return check
