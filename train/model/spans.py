"""Named regions of a step, and arithmetic with time intervals.

A region costs a few microseconds when nothing is recorded; `sampling.py` records some steps. Times are in milliseconds.
`Intervals` do not overlap and are sorted by time.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

PREFIX = "lab:"

Interval = tuple[float, float]
Intervals = list[Interval]


@dataclass(eq=False)  # two watchers see the same work, and yet the end of one must not end the other
class Work:
    """What this process computes now: `kind` F, B, I or W of microbatch `microbatch` on stage `stage`, as `span` names
    them; None between them."""

    kind: str | None = None
    stage: int = 0
    microbatch: int = 0


# The watchers of this process. Like the profiler, they see all of the process's work, whichever thread runs it.
_WATCHERS: list[Work] = []


@contextmanager
def watched() -> Iterator[Work]:
    """A `Work` that always says what the process computes, until the context ends. The proof uses it."""
    work = Work()
    _WATCHERS.append(work)
    try:
        yield work
    finally:
        _WATCHERS.remove(work)


def span(name: str, *of: object) -> AbstractContextManager[object]:
    """A context manager for a region that the profiler shows as `lab:name of…`.

    The regions are `data`, `optimiser`, `layer n` (its forward) and `comm axis op bytes` (from the ledger). Those of
    microbatch m on stage s are named as in `timetable.Action`: `F s m` is a forward, `B s m` a backward, `I s m` and
    `W s m` are the two halves of a backward. The forwards of an evaluation are `F s m` too.
    """
    from torch.profiler import record_function

    region = record_function(PREFIX + " ".join(map(str, (name, *of))))
    return _announced(region, name, *of) if _WATCHERS and name in ("F", "B", "I", "W") else region


@contextmanager
def _announced(region: AbstractContextManager[object], name: str, of_stage: Any, of: Any) -> Iterator[None]:
    before = [(work, work.kind, work.stage, work.microbatch) for work in _WATCHERS]
    for work in _WATCHERS:
        work.kind, work.stage, work.microbatch = name, of_stage, of
    try:
        with region:
            yield
    finally:
        for work, kind, stage, microbatch in before:
            work.kind, work.stage, work.microbatch = kind, stage, microbatch


def union(intervals: Iterable[Interval], gap: float = 0.0) -> Intervals:
    """The union of the intervals; neighbours that are at most `gap` apart are joined."""
    joined: Intervals = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def clip(intervals: Intervals, start: float, end: float) -> Intervals:
    """The part of the intervals that lies in [start, end]."""
    first = bisect_right(intervals, start, key=lambda interval: interval[1])
    last = bisect_left(intervals, end, key=lambda interval: interval[0])
    return [(max(a, start), min(b, end)) for a, b in intervals[first:last]]


def intersect(left: Intervals, right: Intervals) -> Intervals:
    return [part for start, end in left for part in clip(right, start, end)]


def subtract(left: Intervals, right: Intervals) -> Intervals:
    """The part of `left` that is not in `right`."""
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
