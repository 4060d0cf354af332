"""An evaluation: its activations, and the sums over ranks of losses and tokens."""

from __future__ import annotations

import torch

from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.update.sums import Place
from train.proof.locating.update.updates import SAME, Updates


def evaluation(updates: Updates, activations: Activations) -> Finding | None:
    """The first wrong part of an evaluation. `activations`: those of the first validation batch."""
    if "evaluate" in updates.plan.config.strategy.differs():
        return None
    verdict = updates.worst("evaluate")
    if verdict is None:
        return None
    found, right = float(updates.found.evaluate[verdict.name]), float(updates.right.evaluate[verdict.name])
    wrong = activations.first_wrong()
    if wrong is not None:
        because = f"the first wrong activation is {wrong.module}: {wrong.guess.because}"
        return updates.found_at("evaluate", verdict, Guess(wrong.guess.kind, wrong.guess.axes, because))
    return updates.found_at(
        "evaluate", verdict, _terms(updates, activations, verdict.name) or updates.factor(found / right)
    )


def _terms(updates: Updates, activations: Activations, name: str) -> Guess | None:
    """Whether the sum has the terms of one rank of an axis alone. Only the first batch's terms are known."""
    if not name.startswith("batch 1, sum"):
        name = "batch 1, sum of losses"
    found, right = float(updates.found.evaluate[name]), float(updates.right.evaluate[name])
    place, losses = Place(updates.sizes, 1), activations.reference.token_losses
    for axis, degree in place.axes.items():
        terms = []
        for i in range(degree):
            rows, positions = place.tokens({axis: i}, len(losses))
            terms.append(float(losses[torch.meshgrid(rows, positions, indexing="ij")].sum()))
        if any(abs(found - term) <= SAME * abs(right) for term in terms):
            return Guess(Kind.own_part, (axis,), "it is the sum over one rank's tokens")
        if any(abs(found - (right - term)) <= SAME * abs(right) for term in terms):
            return Guess(Kind.part_missing, (axis,), "the tokens of one rank are missing")
    return None
