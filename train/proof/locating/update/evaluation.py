"""An evaluation: its activations, and the sums over ranks of losses and tokens."""

from __future__ import annotations

from train.config.fields import IGNORE_INDEX
from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.kinds import SAME
from train.proof.locating.update.sums import Place
from train.proof.locating.update.updates import Updates


def evaluation(updates: Updates, activations: Activations) -> Finding | None:
    """The first wrong part of an evaluation. `activations`: those of the first validation batch."""
    if "evaluate" in updates.plan.config.differs():
        return None
    verdict = updates.worst("evaluate")
    if verdict is None:
        return None
    found, right = float(updates.found.evaluate[verdict.name]), float(updates.right.evaluate[verdict.name])
    wrong = activations.first_wrong()
    if wrong is not None:
        because = f"the first wrong activation is {wrong.module}: {wrong.guess.because}"
        return updates.found_at("evaluate", verdict, Guess(wrong.guess.kind, wrong.guess.axes, because))
    by_factor = updates.factor(found / right) if right else Guess(Kind.unknown)
    return updates.found_at("evaluate", verdict, _terms(updates, activations, verdict.name) or by_factor)


def _terms(updates: Updates, activations: Activations, name: str) -> Guess | None:
    """Whether the number has the tokens of one rank of an axis alone. Only the first batch's tokens are known."""
    what, reference = name.partition(", ")[2], activations.reference
    found, right = (float(side.evaluate[f"batch 1, {what}"]) for side in (updates.found, updates.right))
    if abs(found - right) <= SAME * abs(right):
        return None
    targets = reference.forward["loss:targets"]
    values = reference.token_losses if what == "sum of losses" else (targets != IGNORE_INDEX).double()
    place = Place(updates.sizes, 1)
    for axis, degree in place.axes.items():
        terms = place.sums(values, axis)
        for times, said in ((1, ""), (degree, f", times {degree}")):
            if any(abs(found - times * term) <= SAME * abs(right) for term in terms):
                return Guess(Kind.own_part, (axis,), f"it has one rank's tokens alone{said}")
        if any(abs(found - (right - term)) <= SAME * abs(right) for term in terms):
            return Guess(Kind.part_missing, (axis,), "the tokens of one rank are missing")
    return None
