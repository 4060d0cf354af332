"""Where the time of a recorded step went.

One rank's `Recording` gives the parts of the step, which do not overlap, and the cost of each collective. The forwards
and backwards of all ranks give the bubble of a pipeline.

The part `communication` is exposed communication only: a message is in flight or awaited, and the device does no other
work. This time is in no other part. On a CPU, `data`, `forward`, `backward` and `optimiser` are the time of their
regions, with the Python code between operators. On a GPU they are the time of the kernels that these regions launched;
`data` also has the host's time while the device is idle. `other` is the rest of the step.

The bubble of a pipeline has three values:
measured      1 - (time in forwards and backwards, summed over ranks) / (ranks x time from the first to the last one)
theory        the bubble of the schedule, replayed without any sending, with the mean time of each kind of work on each
              stage: it contains the schedule's own bubble and the effect of uneven stages
closed form   the bubble for equal stages and equal halves of a backward (strategies/pipeline/timetable.py)

The measured value minus the theory is the cost of sending, and of waiting that the schedule does not require.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any

from train.config.strategy import Order
from train.measure.recording import Message, Recording
from train.measure.results import COMPUTE_PARTS, TIME_PARTS, MiB
from train.model.spans import Intervals, clip, intersect, length, subtract, union
from train.strategies.pipeline.timetable import Action, timetable

PHASES = {"F": "forward", "B": "backward", "I": "backward", "W": "backward", "data": "data", "optimiser": "optimiser"}
Timeline = list[list[Any]]  # [kind, stage, microbatch, start ms, end ms]


def parts(recording: Recording) -> dict[str, Intervals]:
    """The intervals of each part in TIME_PARTS. They do not overlap, and together they cover the step."""
    whole: Intervals = [(0.0, recording.step_ms)]
    exposed = intersect(whole, subtract(recording.in_flight, recording.work))
    found: dict[str, Intervals] = {"communication": exposed}
    rest = subtract(whole, exposed)
    for name in (*COMPUTE_PARTS, "data"):
        found[name] = intersect(rest, _phase(recording, name))
        rest = subtract(rest, found[name])
    found["other"] = rest
    return {name: found[name] for name in TIME_PARTS}


def _phase(recording: Recording, name: str) -> Intervals:
    hosts = [r.interval for r in recording.regions if PHASES.get(r.words[0]) == name]
    if not recording.phase_work:
        return union(hosts)
    kernels = [i for word, intervals in recording.phase_work.items() if PHASES[word] == name for i in intervals]
    if name == "data":
        kernels += subtract(union(hosts), recording.work)
    return union(kernels)


def collectives(recording: Recording, exposed: Intervals) -> dict[str, dict[str, float]]:
    """Calls, mib, ms (of the transfers) and exposed_ms for each `axis/op`. Exposed time is counted for the earliest
    message in flight. If none is in flight, because a wait can last longer than its transfer, it is counted for the
    message that was requested last."""
    rows: dict[str, dict[str, float]] = {}
    cursor, row = 0.0, None
    for message in sorted(recording.messages, key=lambda m: m.interval):
        start, end = message.interval
        if row is not None and start > cursor:
            row["exposed_ms"] += length(clip(exposed, cursor, start))
        row = _row(rows, message)
        row["exposed_ms"] += length(clip(exposed, max(start, cursor), max(end, cursor)))
        cursor = max(cursor, end)
    if row is not None:
        row["exposed_ms"] += length(clip(exposed, cursor, recording.step_ms))
    return rows


def _row(rows: dict[str, dict[str, float]], message: Message) -> dict[str, float]:
    zero = {"calls": 0.0, "mib": 0.0, "ms": 0.0, "exposed_ms": 0.0}
    row = rows.setdefault(f"{message.axis}/{message.op}", zero)
    row["calls"] += message.counted
    row["mib"] += message.bytes / MiB
    row["ms"] += message.ran
    return row


BUS_FACTORS = {"all_reduce": lambda n: 2 * (n - 1) / n, "all_gather": lambda n: (n - 1) / n,
               "reduce_scatter": lambda n: (n - 1) / n, "all_to_all": lambda n: (n - 1) / n}  # fmt: skip


def bandwidths(row: dict[str, float], op: str, size: int | None) -> dict[str, float]:
    """Algorithm and bus bandwidth in GB/s (10^9) over the time of the transfers, with the factors of nccl-tests. A send
    has no bandwidth here, because its time includes the wait for a peer that is not ready."""
    if row["ms"] <= 0 or op == "send":
        return {}
    algorithm = row["mib"] * MiB / (row["ms"] * 1e6)
    if size is None:
        return {"algbw_gb_per_s": algorithm}
    return {"algbw_gb_per_s": algorithm, "busbw_gb_per_s": algorithm * BUS_FACTORS.get(op, lambda n: 1.0)(size)}


def actions(recording: Recording) -> Timeline:
    """[kind, stage, microbatch, start ms, end ms] of every forward and backward, sorted by start."""
    rows = [(r.words[0], int(r.words[1]), int(r.words[2]), *r.interval) for r in recording.actions]
    return [list(row) for row in sorted(rows, key=lambda row: row[3])]


def measured_bubble(timelines: Iterable[Timeline]) -> float:
    """The measured bubble as a fraction. The times of all ranks must have the same zero."""
    rows = [row for row in timelines if row]
    total = max(end for row in rows for *_, end in row) - min(start for row in rows for *_, start, _ in row)
    busy = sum(length(union((start, end) for *_, start, end in row)) for row in rows)
    return 1 - busy / (total * len(rows))


def theory_bubble(timelines: Iterable[Timeline], order: Order) -> float:
    """The bubble, as a fraction, of the schedule replayed with the mean times of these ranks."""
    times: dict[tuple[str, int], list[float]] = defaultdict(list)
    for timeline in timelines:
        for kind, stage, _, start, end in timeline:
            times[kind, stage].append(end - start)
    means = {key: mean(values) for key, values in times.items()}

    def duration(action: Action) -> float:
        # torch runs both halves of a backward as one where it can, and separately where it cannot
        whole = means.get((action.kind, action.stage))
        if whole is not None:
            return whole
        parts = {"B": ("I", "W"), "I": ("B",), "W": ()}.get(action.kind, ())
        return sum(means.get((part, action.stage), 0.0) for part in parts)

    return timetable(order.rows, order.num_stages, duration).bubble
