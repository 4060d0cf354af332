"""Where a strategy goes wrong, as `scripts/verify.py` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from train.config.plan import Plan
from train.proof.locating.finding import Finding


@dataclass(frozen=True)
class Place:
    """What a search has found. `finding`: the first thing that is wrong; None if there is none. `problem`: why there
    was no search."""

    finding: Finding | None = None
    problem: str = ""


def differs(result: dict[str, Any]) -> bool:
    """Whether a column differs that should not. `result`: of a job of the proof."""
    from train.proof.comparison import Verdict

    return any(not Verdict(*values).ok for values in result.get("verdicts", ()))


def place_of(result: dict[str, Any]) -> Place:
    """`result`: of a traced job of the proof."""
    if "finding" in result:
        return Place(result["finding"])
    reason = result.get("unjudged") or result.get("error", "").strip().splitlines()[-1:]
    return Place(problem=f"the traced run failed: {reason if isinstance(reason, str) else ''.join(reason)}")


def lines(place: Place, plan: Plan) -> Iterator[str]:
    """What is printed below the table of a strategy."""
    if place.problem:
        yield f"not located: {place.problem}"
        return
    if place.finding is None:
        yield "located: every module's output and gradient, and every part of the update, is one device's"
    else:
        finding = place.finding
        yield finding.sentence()
    if plan.config.compile.enabled:
        yield "inside compiled blocks nothing is seen: use compile.enabled=false"
