"""Order statistics of measured values; what a run's summary and a comparison say is computed here, once."""

from __future__ import annotations

import math

CONFIDENCE = 0.95


def quantile(of: list[float], share: float) -> float | None:
    """Linear between the two values nearest in rank, as numpy does; None of none."""
    if not of:
        return None
    ordered, place = sorted(of), share * (len(of) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(of: list[float]) -> tuple[float | None, float | None]:
    """At least 95 % confidence for the median, whatever the distribution: two of the values, by the binomial.

    The k-th value from either end: the median lies beyond them with probability 2 P(Bin(n, 1/2) <= k - 1), and k is the
    largest that keeps it under 5 %. Fewer than 6 values cannot give 95 %: (None, None).
    """
    n, k, tail = len(of), 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= (1 - CONFIDENCE) / 2:  # a quotient of integers, however large
        k += 1
    if k == 0:
        return None, None
    ordered = sorted(of)
    return ordered[k - 1], ordered[n - k]
