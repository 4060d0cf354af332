"""What several processes or machines were started with, compared. Torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.config.problems import Problem
from train.config.rules.idle import written


def disagreements(started: Mapping[str, Mapping[str, Any]], who: str, fix: str) -> list[Problem]:
    """A problem for each key whose values differ, with those who have each of them. A key may be missing.

    `started`: the values by key of each one, by its name. `who`: what they are, in the plural.
    """
    problems = []
    for key in sorted({key for values in started.values() for key in values}):
        holders: dict[str, list[str]] = {}
        for name, values in started.items():
            if key in values:
                holders.setdefault(written(values[key]), []).append(name)
        if len(holders) > 1:
            shown = "; ".join(f"{value} on {who} {', '.join(names)}" for value, names in holders.items())
            problems.append(Problem("disagree", f"{who} have different values of {key}: {shown}", fix))
    return problems
