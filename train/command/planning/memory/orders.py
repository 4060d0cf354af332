"""The order of a rank's forwards and backwards in a pipeline, without torch, which has the tables (`timetable.py`).

Only the order matters here, and that it repeats: of many microbatches, so many are enough that every state occurs in
which a rank can be. tests/test_footprint.py compares the orders with torch's tables. Actions are (kind, stage) with the
kinds of `timetable.Action`.
"""

from __future__ import annotations

from collections.abc import Iterator

Action = tuple[str, int]
ROUNDS = 4  # of microbatches that show every state of an interleaved schedule


def order(schedule: str, num_ranks: int, chunks: int, microbatches: int, rank: int) -> tuple[Action, ...]:
    p, v, m = num_ranks, chunks, microbatches
    if schedule in ("gpipe", "looped_bfs"):
        stages = [chunk * p + rank for chunk in range(v)]
        forwards = [("F", stage) for stage in stages for _ in range(m)]
        return (*forwards, *(("B", stage) for stage in reversed(stages) for _ in range(m)))
    if schedule == "1f1b":
        ahead = min(p - rank, m)
        steady = [("B", rank), ("F", rank)] * min(m - ahead, 2)
        return (*[("F", rank)] * ahead, *steady, *[("B", rank)] * ahead)
    if schedule == "zbv_zero_bubble":
        return tuple(v_zero_bubble(p, min(m, 4 * p), rank))
    if schedule == "dualpipev":
        return tuple(dual_v(p, min(m, 4 * p), rank))
    return tuple(interleaved(p, v, m, rank, split=schedule == "interleaved_zero_bubble"))


def interleaved(p: int, v: int, m: int, rank: int, *, split: bool) -> Iterator[Action]:
    """Warm-up forwards, one forward and one backward in turn, and the remaining backwards. `split`: the weights' part
    of a backward comes `rank` backwards later."""
    rounds = max(1, m // p)
    each = m // rounds
    total = v * each * min(rounds, ROUNDS)
    warm = min((v - 1) * each + (1 if split else 2) * (p - 1 - rank), total)

    def forward(step: int) -> int:
        return step // each % v * p + rank

    def backward(step: int) -> int:
        return (v - 1 - step // each % v) * p + rank

    for step in range(warm):
        yield "F", forward(step)
    for step in range(total):
        if warm + step < total:
            yield "F", forward(warm + step)
        yield ("I" if split else "B"), backward(step)
        if split and step >= rank:
            yield "W", backward(step - rank)
    for step in range(max(total - rank, 0), total) if split else ():
        yield "W", backward(step)


def v_zero_bubble(p: int, m: int, rank: int) -> Iterator[Action]:
    """Stages `rank` and 2p - 1 - rank. torch makes the order for at least 2p - 1 microbatches, and leaves out those
    that there are not."""
    several = max(2 * p - 1, m)
    stages = (rank, 2 * p - 1 - rank)
    done = {(kind, stage): 0 for kind in "FIW" for stage in stages}

    def act(kind: str, chunk: int) -> Iterator[Action]:
        stage = stages[chunk]
        done[kind, stage] += 1
        if done[kind, stage] <= m:
            yield kind, stage

    def count(kind: str, chunk: int) -> int:
        return done[kind, stages[chunk]]

    def acts(*what: tuple[str, int]) -> Iterator[Action]:
        for kind, chunk in what:
            yield from act(kind, chunk)

    yield from acts(*[("F", 0)] * (2 * (p - rank) - 1))
    for _ in range(rank):
        yield from acts(("F", 1), ("F", 0))
    for _ in range(p - rank):
        yield from acts(("F", 1), ("I", 1), ("W", 1))
    while count("F", 1) < count("F", 0) or count("F", 0) < several:
        if count("F", 0) < several:
            yield from act("F", 0)
        yield from acts(("I", 0), ("W", 0), ("F", 1), ("I", 1), ("W", 1))
    for _ in range(rank):
        yield from acts(("I", 0), ("I", 1))
    for _ in range(p - rank):
        yield from acts(("I", 0), ("W", 0))
    while count("W", 1) < count("I", 1):
        yield from act("W", 1)
    while count("W", 0) < count("I", 0):
        yield from act("W", 0)


def dual_v(p: int, m: int, rank: int) -> Iterator[Action]:
    """DualPipeV's steps, as torch numbers them."""
    first, second = rank, 2 * p - 1 - rank
    waiting: list[int] = []  # stages whose weights' gradients are to be computed

    def inputs(stage: int) -> Action:
        waiting.append(stage)
        return "I", stage

    def weights() -> Iterator[Action]:
        if waiting:
            yield "W", waiting.pop(0)

    yield from [("F", first)] * (2 * (p - rank - 1))
    yield from [("F", first), ("F", second)] * (rank + 1)
    for _ in range(p - rank - 1):
        yield inputs(second)
        yield from weights()
        yield "F", second
    yield from [("F", first), ("B", second), ("F", second), ("B", first)] * (m - 2 * p + rank + 1)
    yield from [("B", second), ("F", second), ("B", first)] * (p - rank - 1)
    split, half = False, (rank + 1) // 2
    for i in range(rank + 1):
        split = split or (i == half and rank % 2 == 1)
        yield inputs(second) if split else ("B", second)
        split = split or (i == half and rank % 2 == 0)
        yield inputs(first) if split else ("B", first)
    for _ in range(p - rank - 1):
        yield from weights()
        yield inputs(first) if split else ("B", first)
    for _ in range(rank + 1):
        yield from weights()
