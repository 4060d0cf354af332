"""Fits the constants of the cost model to measured speeds, within the spread that each was expected to have.

The fit minimises the sum of |log(predicted / measured)|, in which a source weighs by the square root of its number of
rows, and the squared distances from the expected values in units of their spreads (Levenberg-Marquardt on weights that
turn squares into absolute values).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.command.planning import constants
from train.command.planning.constants import Constants
from train.command.planning.quantities import Quantities
from train.command.planning.step_time import step_time

Vector = NDArray[np.float64]
NAMES = tuple(field.name for field in dataclasses.fields(Constants))
ROUNDS, STEP, SMALLEST = 8, 0.03, 0.02
PULL = 2.0  # the weight of the expected values against the errors, whose weights sum to about 10 x sqrt(rows)
MOST = {"sustained": 1.0, "links": 1.0, "network": 1.0, "attention_products": 1.0}  # shares of a physical limit


@dataclass(frozen=True)
class Point:
    """A measured run: its quantities, its speed in tokens per second and device, and its source."""

    quantities: Quantities
    measured: float
    source: str


def errors(points: Sequence[Point], c: Constants) -> Vector:
    """log(predicted / measured) of the speeds."""
    found = [math.log(step_time(one.quantities, c).tokens_per_s_per_device / one.measured) for one in points]
    return np.array(found)


def fitted(points: Sequence[Point]) -> Constants:
    """The constants that fit these points best; with no points the expected ones."""
    stored = constants.stored()
    expected = np.log([float(stored[name]["expected"]) for name in NAMES])
    spread = np.array([float(stored[name]["spread"]) for name in NAMES])
    if not points:
        return of_logs(expected)
    rows = Counter(one.source for one in points)
    weights = np.array([10 / math.sqrt(rows[one.source]) for one in points])
    at, damping = expected.copy(), 0.01
    found = errors(points, of_logs(at))
    cost = _cost(found, weights, at, expected, spread)
    for _ in range(ROUNDS):
        slopes = np.empty((len(points), len(NAMES)))
        for i in range(len(NAMES)):
            moved = at.copy()
            moved[i] += STEP
            slopes[:, i] = (errors(points, of_logs(moved)) - found) / STEP
        pull = weights / np.maximum(np.abs(found), SMALLEST)
        matrix = slopes.T @ (pull[:, None] * slopes) / 2 + PULL * np.diag(1 / spread**2)
        gradient = slopes.T @ (pull * found) / 2 + PULL * (at - expected) / spread**2
        before = cost
        for _ in range(5):
            change = -np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), gradient)
            there = at + np.clip(change, -0.5, 0.5)
            new = errors(points, of_logs(there))
            if (new_cost := _cost(new, weights, there, expected, spread)) < cost:
                at, found, cost, damping = there, new, new_cost, damping / 3
                break
            damping *= 4
        if before - cost < 1e-3 * before:
            break
    return of_logs(at)


def of_logs(logs: Vector) -> Constants:
    values = dict(zip(NAMES, np.exp(logs), strict=True))
    return Constants(**{name: min(float(value), MOST.get(name, math.inf)) for name, value in values.items()})


def _cost(found: Vector, weights: Vector, at: Vector, expected: Vector, spread: Vector) -> float:
    return float((weights * np.abs(found)).sum() + PULL * (((at - expected) / spread) ** 2).sum())
