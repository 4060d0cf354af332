"""The results of launch.netlab, read from its folder: predictions, what the runs measured, and the links. Torch is not
imported."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.checking import records
from launch.emulating.cluster import PAYLOAD, RESULTS
from train.command.planning.links import edge_bytes
from train.record.run_files import Unreadable, number, read_json
from train.record.run_folder import read_folder

COMPUTED = ("compute", "optimiser", "other")  # parts of a step that are none of the network's
APART = 0.1  # two step times differ if they do by this share


@dataclass(frozen=True)
class Row:
    """A run at one speed. `inter`: bit/s of the links; None if unshaped. `measured_ms`: the median step, None if the
    run has not finished. `explained_ms`: its own computation with the predicted messages. `sent`: bytes of a step out
    of the host that sends most, with what validation and the start send."""

    label: str
    strategy: str
    inter: float | None
    crossing: tuple[str, ...]
    status: str
    predicted_ms: float
    predicted_sent: float
    measured_ms: float | None = None
    tokens: float | None = None
    explained_ms: float | None = None
    sent: float | None = None

    def error(self, value: float | None) -> float | None:
        """By how much of the measured time it is off."""
        return None if value is None or self.measured_ms is None else value / self.measured_ms - 1


@dataclass(frozen=True)
class Message:
    """A message on a link. `limit_us`: what the link's payload rate takes for it."""

    inter: float
    op: str
    bytes: int
    us: float
    limit_us: float


@dataclass(frozen=True)
class Results:
    """`unshaped`: bit/s that the links reach without shapers."""

    rows: tuple[Row, ...]
    messages: tuple[Message, ...]
    unshaped: float
    line: str
    hosts: int
    processes: int
    environment: dict[str, str]

    @property
    def speeds(self) -> list[float | None]:
        """From the slowest to unshaped."""
        found = dict.fromkeys(row.inter for row in self.rows)
        return sorted(found, key=lambda speed: float("inf") if speed is None else speed)

    def at(self, speed: float | None) -> list[Row]:
        return [row for row in self.rows if row.inter == speed]


def read(folder: Path) -> Results:
    """Raises Unreadable if the folder has no results of launch.netlab."""
    values = read_json(folder / RESULTS)
    try:
        cluster = (values or {})["cluster"]
        nodes, nproc = int(cluster["nodes"]), int(cluster["nproc"])
        rows = [_row(one) for one in (values or {})["rows"]]
        unshaped = float((values or {})["unshaped_mbit"]) * 1e6
        messages = [*_messages((values or {})["links"], nodes, nproc)]
        line = " ".join(map(str, (values or {})["line"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"{folder / RESULTS} is not one that launch.netlab wrote ({error!r})") from error
    facts = next((found for one in (values or {})["rows"] if (found := _facts(one))), {})
    return Results(tuple(rows), tuple(messages), unshaped, line, nodes, nproc, facts)


def _row(values: dict[str, Any]) -> Row:
    parts = {name: float(ms) for name, ms in values["predicted_parts_ms"].items()}
    found = Row(
        str(values["label"]),
        str(values["strategy"]),
        number(values["inter"]),
        tuple(map(str, values["crossing"])),
        str(values.get("status", "not run")),
        float(values["predicted_ms"]),
        float(sum(values["predicted_sent"].values())),
    )
    if found.status != "done" or not values.get("run_dir"):
        return found
    run = records.read(Path(values["run_dir"]))
    facts = read_folder(Path(values["run_dir"]))
    steps = sum("train/loss" in record for record in facts.records)
    own = sum(run.parts.get(part, 0.0) for part in COMPUTED)
    # while a stage waits in the bubble, others compute: as long as this run did
    bubble = float(values["predicted_bubble_ms"])
    computed = bubble * run.parts.get("compute", 0.0) / parts["compute"] if bubble else 0.0
    messages = sum(ms for part, ms in parts.items() if part not in COMPUTED) - bubble + computed
    counted = [max(map(float, both)) for both in values.get("sent", {}).values()]
    return Row(
        *(found.label, found.strategy, found.inter, found.crossing, found.status),
        *(found.predicted_ms, found.predicted_sent),
        measured_ms=run.step_ms,
        tokens=number(facts.summary.get("perf/tokens_per_s")),
        explained_ms=own + messages if run.parts else None,
        sent=max(counted) / steps if counted and steps else None,
    )


def _facts(values: dict[str, Any]) -> dict[str, str]:
    if values.get("status") != "done" or not values.get("run_dir"):
        return {}
    work = read_folder(Path(values["run_dir"])).work
    return {name: str(work[name]) for name in ("commit", "torch", "device", "platform", "omp_threads") if name in work}


def _messages(rows: Sequence[Sequence[Any]], nodes: int, nproc: int) -> Iterator[Message]:
    """Those between all processes, on shaped links: a ring through all hosts leaves each of them once."""
    for speed, op, ranks, size, us in rows:
        if speed is None or ranks != nproc or nproc % nodes:
            continue
        each = nproc // nodes
        edges = each * (nproc - each) if op == "all_to_all" else 1
        limit = 8 * edges * edge_bytes(str(op), ranks, float(size)) / (float(speed) * PAYLOAD)
        yield Message(float(speed), str(op), int(size), float(us), 1e6 * limit)


@dataclass(frozen=True)
class Pairs:
    """Of all pairs of runs at the same speed: how many there are, how many differ by more than 10 %, and how many of
    these are in the order that was predicted. `wrong`: those that are not."""

    count: int
    apart: int
    right: int
    wrong: tuple[str, ...]


def pairs(results: Results) -> Pairs:
    count = apart = right = 0
    wrong = []
    for speed in results.speeds:
        for a, b in itertools.combinations([row for row in results.at(speed) if row.measured_ms is not None], 2):
            assert a.measured_ms is not None and b.measured_ms is not None
            count += 1
            if abs(a.measured_ms - b.measured_ms) <= APART * min(a.measured_ms, b.measured_ms):
                continue
            apart += 1
            if (a.measured_ms < b.measured_ms) == (a.predicted_ms < b.predicted_ms):
                right += 1
            else:
                wrong.append(f"{a.label} and {b.label} at {speed_of(speed)}")
    return Pairs(count, apart, right, tuple(wrong))


def speed_of(speed: float | None) -> str:
    return "unshaped" if speed is None else f"{speed / 1e6:g} Mbit/s"


@dataclass(frozen=True)
class Crossing:
    """Where two runs are equally fast: at this speed of the links (bit/s), for this many milliseconds a step."""

    first: str
    second: str
    speed: float
    ms: float
    predicted: bool


def crossings(results: Results) -> list[Crossing]:
    """Between neighbouring speeds, on straight lines in log-log, of the measured times and of the predicted ones."""
    found = []
    speeds = [speed for speed in results.speeds if speed is not None]
    for predicted in (False, True):
        times = {(row.label, row.inter): row.predicted_ms if predicted else row.measured_ms for row in results.rows}
        labels = list(dict.fromkeys(row.label for row in results.rows))
        for (a, b), (low, high) in itertools.product(itertools.combinations(labels, 2), itertools.pairwise(speeds)):
            known = [times.get((name, at)) for at in (low, high) for name in (a, b)]
            if any(value is None for value in known):
                continue
            a_low, b_low, a_high, b_high = (value for value in known if value is not None)
            if (a_low - b_low) * (a_high - b_high) < 0:
                found.append(Crossing(a, b, *_where(low, high, (a_low, b_low), (a_high, b_high)), predicted))
    return found


def _where(low: float, high: float, at_low: tuple[float, float], at_high: tuple[float, float]) -> tuple[float, float]:
    before, after = math.log(at_low[0] / at_low[1]), math.log(at_high[0] / at_high[1])
    share = before / (before - after)
    speed = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    ms = math.exp(math.log(at_low[0]) + share * (math.log(at_high[0]) - math.log(at_low[0])))
    return speed, ms
