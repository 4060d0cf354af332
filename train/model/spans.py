"""Named regions of a step, and the arithmetic of the times they take.

A region costs a few microseconds when nobody records (`sampling.py` does, now and then). Times are milliseconds;
`Intervals` are disjoint, in rising order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.profiler import record_function

PREFIX = "lab:"

Interval = tuple[float, float]
Intervals = list[Interval]


def span(name: str, *of: object) -> record_function:
    """A context whose region the profiler shows as `lab:name of…`.

    `data`, `optimiser`, `layer n` (its forward), `comm axis op bytes` (by the ledger); and of microbatch m on stage s,
    as in `timetable.Action`: `F s m` a forward, `B s m` a backward, `I s m` and `W s m` the two halves of one.
    """
    from torch.profiler import record_function

    return record_function(PREFIX + " ".join(map(str, (name, *of))))


def union(intervals: Iterable[Interval], gap: float = 0.0) -> Intervals:
    """Their union; what lies nearer than `gap` is joined."""
    joined: Intervals = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def clip(intervals: Intervals, start: float, end: float) -> Intervals:
    """The part of them that lies in [start, end]."""
    first = bisect_right(intervals, start, key=lambda interval: interval[1])
    last = bisect_left(intervals, end, key=lambda interval: interval[0])
    return [(max(a, start), min(b, end)) for a, b in intervals[first:last]]


def intersect(left: Intervals, right: Intervals) -> Intervals:
    return [part for start, end in left for part in clip(right, start, end)]


def subtract(left: Intervals, right: Intervals) -> Intervals:
    """`left` without `right`."""
    rest: Intervals = []
    for start, end in left:
        for a, b in clip(right, start, end):
            if a > start:
                rest.append((start, a))
            start = b
        if end > start:
            rest.append((start, end))
    return rest


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)
