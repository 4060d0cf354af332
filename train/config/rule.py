"""A rule: its name, its reason in a sentence, its check, and the fixes that the check proposes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing


@dataclass(frozen=True)
class Finding:
    """A broken rule. `message` gives the value and the rule.

    `fixes` are lines of overrides, best first, which may also set `nproc`. `validate` tries each of them, alone and
    together with the fixes of other broken rules, and shows only lines that leave no problem. So a check does not have
    to know the other rules. `otherwise` is advice in words for the case that no such line is found. It names no
    override.
    """

    message: str
    fixes: tuple[str, ...] = ()
    otherwise: str = "use another strategy"


@dataclass(frozen=True)
class Rule:
    """`check` returns None if the plan follows the rule. It is only asked about values within their fields' ranges."""

    name: str
    reason: str
    check: Callable[[Plan], Finding | None]


def divisors(value: int, limit: int = 1024) -> list[int]:
    return [d for d in range(1, min(value, limit) + 1) if value % d == 0]


def below(degree: int) -> list[int]:
    """Smaller degrees to try: first the nearest ones, then a half, a quarter, and so on."""
    halves = [degree >> i for i in range(1, degree.bit_length())]
    return [*dict.fromkeys([*range(degree - 1, max(degree - 9, 0), -1), *halves])]


def nearest(options: list[int], to: int) -> list[int]:
    """`options` by their distance from `to`; the smaller first of two at the same distance."""
    return sorted(options, key=lambda option: (abs(option - to), option))


def degree_fixes(plan: Plan, axis: str, degrees: list[int]) -> tuple[str, ...]:
    """Lines of overrides that give `axis` one of `degrees`. They set the key, the key and the number of processes, or,
    if the degree is -1, the number of processes alone."""
    lines = []
    for degree in degrees:
        nproc = plan.world_size // plan.degrees[axis] * degree
        if plan.axes.get(axis) == -1:
            lines += [f"nproc={nproc}"]
        lines += [f"strategy.{axis}={degree}", f"strategy.{axis}={degree} nproc={nproc}"]
    return tuple(lines)


def divides(axis: str, name: str, value: Callable[[Plan], int]) -> Callable[[Plan], Finding | None]:
    """A check that the degree of `axis` divides `value`, which the key `name` sets. Every degree divides 0."""

    def check(plan: Plan) -> Finding | None:
        degree, found = plan.degrees[axis], value(plan)
        if found % degree == 0:
            return None
        message = f"{name}={found} is not divisible by strategy.{axis}={degree}"
        fixes = degree_fixes(plan, axis, nearest(divisors(found), degree))
        return Finding(message, fixes, f"use a smaller strategy.{axis}")

    return check


def no_selective_recomputation(plan: Plan, what: str) -> Finding | None:
    """For what is not supported with selective recomputation, such as "strategy.ep=2"."""
    if plan.config.train.activation_checkpointing is not ActivationCheckpointing.selective:
        return None
    message = f"train.activation_checkpointing=selective is not supported with {what}"
    return Finding(message, ("train.activation_checkpointing=full", "train.activation_checkpointing=none"))
