"""Order statistics of measured values, for the summary of a run and for a comparison."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

CONFIDENCE = 0.95
EXACT, DIGITS = 20_000, 4


class Tally:
    """Counts how often each value occurred. This is all that order statistics need, and it stays small in a long run.

    It is exact for up to `EXACT` different values. Beyond that, values are rounded to `DIGITS` significant digits (a
    relative error of 5e-4 at most), so that the number of different values stays bounded.
    """

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.counts: dict[float, int] = {}
        self.rounded = False
        for value in values:
            self.add(value)

    def add(self, value: float) -> None:
        self._count(value, 1)
        if len(self.counts) > EXACT and not self.rounded:
            self.rounded, counts, self.counts = True, self.counts, {}
            for one, times in counts.items():
                self._count(one, times)

    def mean(self) -> float | None:
        """None if there are no values."""
        return math.fsum(v * n for v, n in self.counts.items()) / sum(self.counts.values()) if self.counts else None

    def ranked(self) -> Ranked:
        """All values, sorted."""
        values = sorted(self.counts)
        return Ranked(values, list(accumulate(self.counts[value] for value in values)))

    def _count(self, value: float, times: int) -> None:
        value = float(f"{value:.{DIGITS - 1}e}") if self.rounded else value
        self.counts[value] = self.counts.get(value, 0) + times


class Ranked:
    """`ranked[k]` is the k-th smallest value, counted from 0. `up_to[i]` values are at most `values[i]`."""

    def __init__(self, values: Sequence[float], up_to: Sequence[int]) -> None:
        self.values, self.up_to = values, up_to

    def __len__(self) -> int:
        return self.up_to[-1] if self.up_to else 0

    def __getitem__(self, k: int) -> float:
        return self.values[bisect_right(self.up_to, k)]


def quantile(of: Sequence[float] | Tally, share: float) -> float | None:
    """Interpolated linearly between the two nearest values, as numpy does. None if there are no values."""
    ordered = _ordered(of)
    if not len(ordered):
        return None
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(of: Sequence[float] | Tally) -> tuple[float | None, float | None]:
    """An interval that contains the median with at least 95 % confidence, for any distribution of the values.

    Its ends are the k-th values from either end. The median lies outside them with probability
    2 P(Bin(n, 1/2) <= k - 1), and k is the largest for which this is at most 5 %. Fewer than 6 values cannot give
    95 %, and then the result is (None, None).
    """
    ordered = _ordered(of)
    n, tail = len(ordered), 0.0
    k = max(0, int(n / 2 - 5 * math.sqrt(n)))  # ten standard deviations below the mean: the tail before it is 0
    while n and (tail := tail + _binomial(n, k)) <= (1 - CONFIDENCE) / 2:
        k += 1
    if k == 0:
        return None, None
    return ordered[k - 1], ordered[n - k]


def _binomial(n: int, k: int) -> float:
    """P(Bin(n, 1/2) = k), computed by logarithms, so that a large n is fast too."""
    return math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))


def _ordered(of: Sequence[float] | Tally) -> list[float] | Ranked:
    return of.ranked() if isinstance(of, Tally) else sorted(of)
