"""A pipeline's bubble: measured, and as it should be.

measured      1 - (what the ranks' forwards and backwards take) / (ranks x the time from the first to the last of them)
theory        the same of the schedule replayed with the mean time that each kind of work took on each stage, sending
              nothing: what remains is the schedule's own, and that of uneven stages
closed form   of equal stages and equal halves of a backward (strategies/pipeline.py)

Measured less theory is what sending, and waiting that the schedule does not ask for, cost.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any

from train.config.strategy import Order
from train.model.spans import length, union
from train.strategies.pipeline.timetable import Action, timetable

Timeline = list[list[Any]]  # [kind, stage, microbatch, start ms, end ms]


def measured(timelines: Iterable[Timeline]) -> float:
    """Of ranks whose times have one zero."""
    rows = [row for row in timelines if row]
    total = max(end for row in rows for *_, end in row) - min(start for row in rows for *_, start, _ in row)
    busy = sum(length(union((start, end) for *_, start, end in row)) for row in rows)
    return 1 - busy / (total * len(rows))


def theory(timelines: Iterable[Timeline], order: Order) -> float:
    """Of the schedule with these ranks' mean times."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for timeline in timelines:
        for kind, stage, _, start, end in timeline:
            times[kind, stage].append(end - start)
    means = {key: mean(values) for key, values in times.items()}

    def duration(action: Action) -> float:
        # torch runs a backward whole where it can put both halves together, or in halves where it cannot
        whole = means.get((action.kind, action.stage))
        if whole is not None:
            return whole
        parts = {"B": ("I", "W"), "I": ("B",), "W": ()}.get(action.kind, ())
        return sum(means.get((part, action.stage), 0.0) for part in parts)

    return timetable(order.rows, order.num_stages, duration).bubble
