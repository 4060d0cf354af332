"""Figures of a set of predictions: errors, choice of layouts, intervals, and the null model."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from scripts.scoring.rows import Row
from train.command.planning.quantities import Quantities
from train.config.flops import flops_per_token

NOISE = 0.04  # relative difference of speeds below which two layouts count as equal: the noise between releases
SMALLEST_FAMILY = 3
NOT_PREDICTED = 1.0  # the error of a row that is not predicted


@dataclass(frozen=True)
class Scored:
    """A row with its speeds: predicted, measured, by the null model, and by a peer (nan without one). Without
    quantities it is not predicted. `low`, `high`: the interval for log(measured / predicted) in which 80 % of rows are
    expected."""

    row: Row
    quantities: Quantities | None
    predicted: float
    measured: float
    null: float
    peer: float = math.nan
    low: float = -math.inf
    high: float = math.inf

    @property
    def error(self) -> float:
        return math.log(self.predicted / self.measured) if self.quantities else NOT_PREDICTED

    @property
    def inside(self) -> bool:
        return self.low <= -self.error <= self.high


@dataclass(frozen=True)
class Errors:
    rows: int
    mean: float
    median: float
    p90: float
    bias: float

    def __str__(self) -> str:
        sizes = "".join(f"{100 * value:>8.1f}" for value in (self.mean, self.median, self.p90))
        return f"{self.rows:>5}{sizes}{100 * self.bias:>+8.1f}"


def summary(found: Iterable[float]) -> Errors:
    signed = np.array([*found])
    size = np.abs(signed)
    return Errors(len(signed), *map(float, (size.mean(), np.median(size), np.quantile(size, 0.9), signed.mean())))


def mean_of(group: Sequence[Scored], model: str) -> str:
    """The mean error in % of another model, `null` or `peer`, over the rows that are predicted; - if it has none."""
    found = [math.log(getattr(one, model) / one.measured) for one in group if one.quantities]
    mean = float(np.mean(np.abs(found))) if found else math.nan
    return "-" if math.isnan(mean) else f"{100 * mean:.1f}"


def mean_of_sources(scored: Sequence[Scored]) -> float:
    by_source = defaultdict(list)
    for one in scored:
        by_source[one.row.source].append(abs(one.error))
    return float(np.mean([np.mean(values) for values in by_source.values()]))


@dataclass(frozen=True)
class Choice:
    """A family: the regret of the layout that was predicted fastest, that of one taken at random, and Kendall's tau."""

    layouts: int
    regret: float
    random_regret: float
    tau: float | None  # None if no two speeds differ by more than the noise


def choices(scored: Sequence[Scored]) -> list[Choice]:
    families: dict[Hashable, dict[Hashable, list[Scored]]] = defaultdict(lambda: defaultdict(list))
    for one in scored:
        families[one.row.family][one.row.layout].append(one)
    found = []
    for layouts in families.values():
        if len(layouts) < SMALLEST_FAMILY:
            continue
        pairs = [
            (float(np.mean([one.measured for one in same])), float(np.mean([one.predicted for one in same])))
            for same in layouts.values()
        ]
        best = max(measured for measured, _ in pairs)
        chosen = max(pairs, key=lambda pair: pair[1])[0]
        mean = float(np.mean([measured for measured, _ in pairs]))
        found.append(Choice(len(pairs), 1 - chosen / best, 1 - mean / best, _tau(pairs)))
    return found


def _tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau over pairs whose measured speeds differ by more than the noise."""
    signs = [
        math.copysign(1, (a - b) * (p - q)) if p != q else 0.0
        for (a, p), (b, q) in itertools.combinations(pairs, 2)
        if abs(a - b) > NOISE * min(a, b)
    ]
    return float(np.mean(signs)) if signs else None


def null_speed(quantities: Quantities, others: Sequence[Scored]) -> float:
    """The speed at the median TFLOP/s of other sources' runs in the same precision on devices with the same rate of
    products; where there are none, at their median share of that rate. nan without any other run."""
    rate = _rate(quantities)
    known = [(one.measured * _flops(one.quantities), _rate(one.quantities)) for one in others if one.quantities]
    if not known:
        return math.nan
    same = [reached for reached, its_rate in known if its_rate == rate]
    reached = float(np.median(same)) if same else rate * float(np.median([a / b for a, b in known]))
    return reached / _flops(quantities)


def _rate(one: Quantities) -> float:
    return one.job.rate_of(one.job.products)


def _flops(one: Quantities) -> float:
    """TFLOPs of a token."""
    config = one.job.plan.config
    return flops_per_token(config.model, config.train.seq_len) / 1e12


def interval(found: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """The 10 % and 90 % quantiles of log(measured / predicted) of (source, value), each source weighing the same."""
    if not found:
        return -math.inf, math.inf
    sizes: dict[str, int] = defaultdict(int)
    for source, _ in found:
        sizes[source] += 1
    values = sorted((value, 1 / sizes[source]) for source, value in found)
    shares = np.cumsum([weight for _, weight in values]) / len(sizes)
    low, high = (values[min(int(np.searchsorted(shares, share)), len(values) - 1)][0] for share in (0.1, 0.9))
    return low, high
