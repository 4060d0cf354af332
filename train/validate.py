"""All that is wrong with a config in a world of a given size, each problem with fixes that were tried.

Pure functions of (config, world_size): no process group, no files, no torch. The rules themselves are in `rules/`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import MISSING

from train.config import Config
from train.plan import Plan
from train.problems import Problem
from train.rules import RULES
from train.rules.base import Finding

NUM_FIXES = 3  # shown; the first is the problem's own


def validate(config: Config, world_size: int) -> list[Problem]:
    """All problems at once, none of them caused by another: rules see values out of range as if they were mended."""
    plan = Plan(config, world_size)
    problems, found = findings(plan)
    broken = {*(problem.rule for problem in problems), *found}
    return problems + [described(plan, rule, finding, broken) for rule, finding in found.items()]


def findings(plan: Plan) -> tuple[list[Problem], dict[str, Finding]]:
    """(Values out of range; the broken rules by name)."""
    problems = [*out_of_range(plan.config), *bad_degrees(plan.config)]
    for line in (override for problem in problems for override in problem.overrides):
        plan = plan.override(line)
    return problems, {rule.name: finding for rule in RULES if (finding := rule.check(plan)) is not None}


def described(plan: Plan, rule: str, finding: Finding, broken: set[str]) -> Problem:
    """The finding with the first of its fixes that mend it and break nothing else."""
    working: list[str] = []
    for line in dict.fromkeys(finding.fixes):
        problems, found = findings(plan.override(line))
        after = {*(problem.rule for problem in problems), *found}
        if rule not in after and after <= broken and not any(set(w.split()) <= set(line.split()) for w in working):
            working.append(line)
        if len(working) == NUM_FIXES:
            break
    if not working:
        return Problem(rule, finding.message, finding.otherwise)
    shown = ", ".join(working[:-1]) + (" or " if len(working) > 1 else "") + working[-1]
    return Problem(rule, finding.message, f"use {shown}", tuple(working[0].split()))


def out_of_range(config: Config) -> Iterator[Problem]:
    """Numbers outside the range that their field declares."""
    for group in dataclasses.fields(config):
        section = getattr(config, group.name)
        if not dataclasses.is_dataclass(section):
            continue
        for field in dataclasses.fields(section):
            value, bounds = getattr(section, field.name), field.metadata
            if bounds and isinstance(value, int | float) and not _inside(value, bounds):
                key = f"{group.name}.{field.name}"
                limits = [f"{text} {bounds[name]:g}" for name, text, _ in _COMPARISONS if bounds[name] is not None]
                default = bounds["ge"] if field.default == MISSING else field.default
                default = "null" if default is None else default
                yield Problem(
                    f"range of {key}",
                    f"{key}={value} is out of range",
                    f"use a finite value {' and '.join(limits)}, such as {default}",
                    (f"{key}={default}",),
                )


_COMPARISONS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("ge", ">=", lambda x, y: x >= y),
    ("gt", ">", lambda x, y: x > y),
    ("lt", "<", lambda x, y: x < y),
)


def _inside(value: float, bounds: Any) -> bool:
    return math.isfinite(value) and all(
        compare(value, bounds[name]) for name, _, compare in _COMPARISONS if bounds[name] is not None
    )


def bad_degrees(config: Config) -> Iterator[Problem]:
    """A degree is a positive number; -1, the ranks that are left, may stand once."""
    axes = config.strategy.mesh_axes()
    for axis, degree in axes.items():
        if degree < 1 and degree != -1:
            key = f"strategy.{axis}"
            yield Problem(f"degree of {axis}", f"{key}={degree} is no degree", f"use {key}=-1, 1, 2, …", (f"{key}=1",))
    free = [axis for axis, degree in axes.items() if degree == -1]
    if len(free) > 1:
        names = " and ".join(f"strategy.{axis}" for axis in free)
        mended = tuple(f"strategy.{axis}=1" for axis in free[1:])
        fix = f"let one axis take the ranks that are left: {' '.join(mended)}"
        yield Problem("one_free_axis", f"{names} are both -1", fix, mended)
