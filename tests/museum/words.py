"""What is said about outcomes, on the terminal and in docs/museum.md."""

import math
from collections.abc import Iterable

from tests.museum.running import Outcome
from train.proof.comparison import Verdict


def margin(verdict: Verdict) -> float:
    """The error in bounds; infinite where everything but equality is an error."""
    return verdict.error / verdict.bound if verdict.bound else math.inf


def margins(outcome: Outcome) -> str:
    """The columns that differ, each with its error in bounds, the largest first."""
    red = sorted(outcome.red.values(), key=margin, reverse=True)
    return ", ".join(f"{v.column} {f'{margin(v):.0e}' if v.bound else 'not equal'} ({v.name})" for v in red)


def place(module: str, axis: str, kind: str) -> str:
    return f"{module}, {f'along {axis}' if axis else 'along no axis'}: {kind}"


def located(outcome: Outcome) -> str:
    """What the localiser said, and what is right or expected."""
    exhibit, finding = outcome.exhibit, outcome.finding
    expected = place(exhibit.module, exhibit.axis, exhibit.kind)
    if finding is None:
        return f"not run; expected {expected}"
    said = place(finding["module"], finding["axis"], finding["kind"])
    if outcome.place_found and outcome.kind_found:
        return f"right: {said}"
    wrong = "the kind is wrong" if outcome.place_found else "the place is wrong"
    return f"{wrong}: {said}; expected {expected}"


def lines(outcome: Outcome) -> str:
    """What the terminal shows of an outcome."""
    if outcome.problem:
        return f"NOT JUDGED  {outcome.exhibit.bug}: {outcome.problem.strip().splitlines()[-1]}"
    if not outcome.patched_calls:
        return f"NOT PLANTED {outcome.exhibit.bug}: the patched line never ran"
    word = "caught     " if outcome.caught else "NOT CAUGHT "
    return f"{word} {outcome.exhibit.bug}: {margins(outcome)}\n            localiser: {located(outcome)}"


def score(outcomes: Iterable[Outcome], total: int) -> str:
    found = list(outcomes)
    caught = sum(outcome.caught for outcome in found)
    text = f"{caught} of {total} caught"
    asked = [outcome for outcome in found if outcome.finding is not None]
    if not asked:
        return f"{text}; the localiser was not run"
    places, kinds = sum(o.place_found for o in asked), sum(o.kind_found for o in asked)
    slowest = max(outcome.finding["seconds"] for outcome in asked if outcome.finding)
    return (
        f"{text}; {places} of {total} localised to the module, or part of the update, and axis "
        f"({100 * places / total:.0f} %); {kinds} to the kind ({100 * kinds / total:.0f} %); "
        f"the slowest localisation took {slowest:.0f} s"
    )
