"""What `scripts/verify.py` prints, and the exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from scripts.verifying.exercise import left_out
from scripts.verifying.places import Place, lines
from scripts.verifying.sizes import Words
from train.config.plan import Plan

if TYPE_CHECKING:  # it imports torch
    from train.proof.comparison import Verdict

EXIT_DIFFERS = 1  # also if a strategy could not be run
EXIT_UNJUDGED = 4


class Answer(Enum):
    equals = "equals one device"
    differs = "differs"
    not_run = "could not be run"
    unjudged = "cannot be judged"


@dataclass(frozen=True)
class Judgement:
    """The answer about a strategy, and the columns that were compared."""

    plan: Plan
    answer: Answer
    verdicts: tuple[Verdict, ...] = ()
    place: Place | None = None  # where it goes wrong, if this was searched

    @property
    def allowed(self) -> str:
        """The columns that differ as the strategy declares, as the end of a sentence."""
        columns = [verdict.column for verdict in self.verdicts if verdict.ok and not verdict.equal]
        return f" but for {', '.join(columns)}" if columns else ""

    @property
    def worst(self) -> Verdict | None:
        """The column with the largest error for its bound, rather one that must be equal."""
        return max(self.verdicts, key=lambda v: (not v.differs, share_of_bound(v)), default=None)


def share_of_bound(verdict: Verdict) -> float:
    """The error relative to its bound. Counts and copies must be equal: their bound is 0."""
    if verdict.error == 0:
        return 0.0
    return verdict.error / verdict.bound if verdict.bound else float("inf")


def exit_code(judgements: Sequence[Judgement]) -> int:
    answers = {judgement.answer for judgement in judgements}
    if answers & {Answer.differs, Answer.not_run}:
        return EXIT_DIFFERS
    return EXIT_UNJUDGED if Answer.unjudged in answers else 0


def introduce(plan: Plan, chosen: Words, replaced: Sequence[str]) -> None:
    """Print the heading of a strategy, the values that the command line left open, and those that are replaced."""
    config = plan.config
    print(f"\n{config.strategy.name} on {plan.world_size} process(es): {layout(plan)}, {config.precision.value}")
    if chosen:
        print("  chosen: " + " ".join(f"{key}={value}" for key, value in chosen.items()))
    if replaced:
        print(f"  the proof has its own optimiser, rates and clipping: not used are {' '.join(replaced)}")


def layout(plan: Plan) -> str:
    shown = " x ".join(f"{axis} {plan.degrees[axis]}" for axis in plan.axes) or "one device"
    return f"{shown} (ep {plan.ep})" if plan.splits_experts else shown


def report(plan: Plan, result: dict[str, Any]) -> Judgement:
    """Print what the proof of a strategy shows, and what it leaves out."""
    from train.proof.comparison import Verdict

    if "error" in result:
        print("  could not be run:")
        print("\n".join(f"    {line}" for line in result["error"].strip().splitlines()))
        return Judgement(plan, Answer.not_run)
    if "unjudged" in result:
        print(f"  cannot be judged: {result['unjudged']}")
        return Judgement(plan, Answer.unjudged)
    if lossy := plan.config.strategy.lossy():
        print(f"  {lossy}")
    verdicts = tuple(Verdict(*values) for values in result["verdicts"])
    _table(verdicts)
    facts = result.get("facts", {})
    if facts.get("choices"):
        print(f"  {facts.get('replayed', 0)} of {facts['choices']} choices of experts replayed")
    if missing := left_out(plan, facts):
        print(f"  not exercised: {'; '.join(missing)}")
    wrong = [v.column for v in verdicts if not v.ok]
    judgement = Judgement(plan, Answer.differs if wrong else Answer.equals, verdicts, result.get("place"))
    for line in lines(judgement.place, plan, wrong=bool(wrong)) if judgement.place else ():
        print(f"  {line}")
    if wrong:
        print(f"  DIFFERS from one device in {', '.join(wrong)}")
    else:
        print(f"  equals one device{judgement.allowed}{', as expected' if judgement.allowed else ''}")
    return judgement


def _table(verdicts: Sequence[Verdict]) -> None:
    names = {v.column: "(all are equal)" if v.error == 0 and not v.name.startswith("(") else v.name for v in verdicts}
    width = max(map(len, names.values()))
    print(f"  {'':<14}{'worst':<{width}}  {'error':>8}  {'bound':>6}")
    for v in verdicts:
        answer = "ok" if v.equal else f"differs, as expected: {v.differs}" if v.ok else "differs"
        print(f"  {v.column:<14}{names[v.column]:<{width}}  {v.error:>8.1e}  {v.bound:>6.0e}  {answer}")


def summarise(judgements: Sequence[Judgement]) -> None:
    """Print a table with one line for each strategy."""
    rows = [("strategy", "layout", "precision", "verdict", "worst column", "error/bound")]
    for one in judgements:
        worst, config = one.worst, one.plan.config
        column, share = (worst.column, f"{share_of_bound(worst):.1e}") if worst else ("", "")
        answer = one.answer.value + (one.allowed if one.answer is Answer.equals else "")
        rows.append((config.strategy.name, layout(one.plan), config.precision.value, answer, column, share))
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    print()
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
