"""The search: every valid layout by closed forms, the best of them with better splits, then replayed event by event.

A mesh is priced as a whole, so that its layouts share their tables, and processes take meshes in turns. A layout is
left out early if even without messages, or without those of data parallelism, it is slower than enough others that fit,
or if its state alone does not fit. None of this changes which layouts are best.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from train.command.planning.job import missing_figures
from train.command.planning.quantities import profile_of_job
from train.command.planning.search.layouts import Layout, meshes
from train.command.planning.search.pricer import Priced, Pricer, Task, order_of, rank_of
from train.command.planning.search.processes import Processes
from train.command.planning.search.tables import priced_job

WIDER = 2  # times as many as are replayed get better splits first, as a split may change their order
OnProgress = Callable[[int, int], None]  # (done, all), in meshes


@dataclass(frozen=True)
class Outcome:
    """`valid`: the number of valid layouts, of which `priced` were not left out early. `best`: the fastest that fit.
    `nearest`: where none fits, the layout that lacks the fewest bytes, and how many. `unknown`: figures that the
    hardware lacks, with the number of layouts that cannot be priced without them."""

    valid: int
    priced: int
    best: tuple[Priced, ...]
    nearest: tuple[Layout, float] | None = None
    unknown: Mapping[str, int] = field(default_factory=dict)


def search(task: Task, *, workers: int = 1, on_progress: OnProgress = lambda done, total: None) -> Outcome:
    """The best layouts, the fastest first. `workers`: processes that share the work."""
    profile_of_job(priced_job(task.base, task.products))  # which refuses a profile that cannot be used
    pricer = Pricer(task)
    known = pricer.valid.sound and not missing_figures(priced_job(task.base, task.products))
    degrees = sorted(meshes(task.base), key=pricer.promise) if known else [*meshes(task.base)]
    valid = priced = 0
    unknown: Counter[str] = Counter()
    best: list[tuple[float, Layout]] = []
    larger: list[tuple[float, Layout]] = []

    def asked() -> Iterator[tuple[tuple[int, ...], float]]:
        for one in degrees:
            yield one, best[-1][0] if len(best) == WIDER * task.kept else math.inf

    with Processes(pricer, workers) as processes:
        for done, one in enumerate(processes.run("mesh", asked()), start=1):
            valid, priced = valid + one.valid, priced + one.priced
            if one.best:
                best = heapq.nsmallest(WIDER * task.kept, [*best, *one.best], key=rank_of)
            larger = [] if best else [*larger, *one.larger]
            unknown.update(dict.fromkeys(one.unknown, one.valid))
            on_progress(done, len(degrees))
        layouts = sorted((layout for _, layout in best), key=order_of)  # so that those of a mesh share their tables
        better = sorted(processes.run("with_better_split", iter(layouts)), key=rank_of)[: task.kept]
        alike = sorted((layout for _, layout in better), key=lambda one: (one.schedule or "", order_of(one)))
        ranked = sorted(processes.run("replay", iter(alike)), key=lambda one: (one.seconds, order_of(one.layout)))
    nearest = None if ranked or not larger else _nearest(pricer, larger)
    return Outcome(valid, priced, tuple(ranked), nearest, unknown)


def _nearest(pricer: Pricer, larger: list[tuple[float, Layout]]) -> tuple[Layout, float]:
    """The layout that lacks the fewest bytes, and how many."""
    task = pricer.task
    best: tuple[float, Layout] | None = None
    for least, layout in sorted(larger, key=rank_of):
        if best is not None and least - task.capacity >= best[0]:
            break
        pair = pricer.missing(task.job(layout)), layout
        best = pair if best is None else min(best, pair, key=rank_of)
    assert best is not None
    return best[1], best[0]
