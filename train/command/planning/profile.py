"""A measured profile of a machine: the tables of `hardware.measured`, which scripts/matmul.py writes.

Every row of a table is a point: where it was measured, then what was found there. Between points, the figures are
interpolated in log space; beyond them, the rate (or a message's bandwidth) of the nearest point holds, but elementwise
work and messages take no less time than the smallest that was measured, which is what the host takes to start them. The
optimiser's sizes lie on a line. DTYPE below is the precision of the computation, as bf16.

    products_DTYPE                      rows, columns, depth -> TFLOP/s
    attention_DTYPE                     sequences x heads, sequence length, head width -> TFLOP/s forward, backward
    layer_DTYPE, layer_DTYPE_compiled   bytes of a layer's elementwise work, forward -> GB/s forward, backward
    loss_DTYPE, loss_DTYPE_compiled     bytes of the loss in one direction -> GB/s forward, backward
    copy                                bytes read and written -> GB/s
    optimiser                           bytes of float32 parameters -> GB/s of all that it reads and writes
    all_reduce_DTYPE and other ops      ranks, bytes by nccl-tests' convention -> microseconds
    rows_gather_DTYPE, rows_scatter_…   the same of activations, by whole sequences, as the lab sends them
    sequence_gather_DTYPE, …_scatter_…  the same by parts of each sequence, with the copies that these need
    overlap_all_reduce and other ops    ranks -> the cost of a message beside products, as a share of the shorter one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from train.config.groups.hardware import HardwareConfig
from train.config.problems import BadInput, Problem
from train.config.rules.ranges import shortened

OPS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send")
# The tables of messages of activations BTD: the operation, and the dimension that is split (shapes.token_dim).
OF_ACTIVATIONS = {
    "rows_gather": ("all_gather", 0),
    "rows_scatter": ("reduce_scatter", 0),
    "sequence_gather": ("all_gather", 1),
    "sequence_scatter": ("reduce_scatter", 1),
}
# the number of columns that say where a row was measured, and of those that say what was found
COLUMNS = {
    "products": (3, 1),
    "attention": (3, 2),
    "layer": (1, 2),
    "loss": (1, 2),
    "copy": (1, 1),
    "optimiser": (1, 1),
}
COLUMNS |= {"overlap": (1, 1)} | dict.fromkeys((*OPS, *OF_ACTIVATIONS), (2, 1))
FREE = ("overlap",)  # tables whose figures may be zero or negative
# A layer that is so many times smaller than the largest takes as long as the host starts it; none takes less. Profiles
# that were measured before, and those of compiled code, have no such layer.
STARTS = 16
NEAREST = 4  # points that decide about a point between them
# How many times the largest measured size the optimiser's line is followed. One point has no line: a few times.
FOLLOWED, FOLLOWED_FROM_ONE = 64.0, 4.0
MOST_KEPT = 2**16  # figures that are kept, as the layouts of a search have most products in common
HOW = "measure the machine again: python scripts/matmul.py, or under torchrun for messages"
Tables = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Profile:
    """`tables`: by name. `compiled`: whether blocks and the loss are compiled."""

    tables: Tables
    precision: str
    compiled: bool

    def product_rate(self, rows: float, columns: float, depth: float) -> float:
        """FLOP/s of one matrix product."""
        return 1e12 * between(self.tables[f"products_{self.precision}"], (rows, columns, depth))[0]

    def attention_rates(self, sequences: float, seq_len: float, width: float) -> tuple[float, float]:
        """FLOP/s of causal attention, forward and backward, with FLOPs as products.py counts them."""
        forward, backward = between(self.tables[f"attention_{self.precision}"], (sequences, seq_len, width))
        return forward * 1e12, backward * 1e12

    def elementwise_rates(self, kind: str, size: float) -> tuple[float, float]:
        """Bytes/s, forward and backward, of the elementwise work of a `layer` or of the `loss`."""
        rows = self.tables[self.mode_of(kind)]
        forward, backward = between(rows, (size,))
        sizes = [row[0] for row in rows]
        starts = kind == "layer" and min(sizes) * STARTS < max(sizes)
        part = min(size / min(sizes), 1.0) if starts else 1.0
        return part * forward * 1e9, part * backward * 1e9

    def mode_of(self, kind: str) -> str:
        """The table of a layer or of the loss: that of compiled code, if this is measured and asked for."""
        compiled = f"{kind}_{self.precision}_compiled"
        return compiled if self.compiled and compiled in self.tables else f"{kind}_{self.precision}"

    def copy_rate(self, size: float) -> float:
        """Bytes/s of a copy; `size`: bytes read and written."""
        return 1e9 * between(self.tables["copy"], (size,))[0]

    def optimiser_rate(self, size: float) -> float | None:
        """Bytes/s of the optimiser; `size`: bytes of float32 parameters. The measured sizes lie on a line, latency and
        bytes / bandwidth, or the small ones stay in a cache. None if the largest of them is far below `size`."""
        rows = self.tables.get("optimiser", ())
        followed = FOLLOWED if len(rows) > 1 else FOLLOWED_FROM_ONE
        if not rows or size > followed * max(row[0] for row in rows):
            return None
        found = line([(row[0], row[0] / row[1]) for row in rows])
        if found is None:
            return 1e9 * between(rows, (size,))[0]
        latency, each = found
        return 1e9 * size / (latency + each * size)

    def message_seconds(self, op: str, ranks: int, size: float, precision: str) -> float | None:
        """The time of one message of `size` bytes. `op`: one of OPS, or of OF_ACTIVATIONS. None if no
        message was measured in groups of this size."""
        rows = self.tables.get(f"{op}_{precision}") or self.tables.get(f"{op}_float32", ())
        same = sorted((row[1], row[2]) for row in rows if row[0] == ranks)
        if not same:
            return None
        (least, shortest), (most, longest) = same[0], same[-1]
        if size <= least:
            return shortest / 1e6  # latency alone
        if size >= most:
            return longest / 1e6 * size / most  # bandwidth alone
        return between(same, (size,))[0] / 1e6

    def has_messages(self, ranks: int) -> bool:
        """Whether messages in groups of this size were measured."""
        return all(any(row[0] == ranks for row in self.tables.get(f"{op}_float32", ())) for op in OPS)

    def overlap_cost(self, op: str, ranks: int) -> float | None:
        """What a message and the products beside it cost each other, as a share of the shorter one."""
        rows = self.tables.get(f"overlap_{op}", ())
        return next((cost for size, cost in rows if size == ranks), None)


def profile_of(hardware: HardwareConfig, precision: str, compiled: bool) -> Profile | None:
    """The profile of a device for runs of a precision. None if it was not measured, or not in this precision.

    Raises BadInput if a table is not one that scripts/matmul.py writes.
    """
    if not hardware.measured:
        return None
    check(hardware)
    return None if lacking(hardware, precision) else Profile(hardware.measured, precision, compiled)


def lacking(hardware: HardwareConfig, precision: str) -> list[str]:
    """The tables that are missing, without which a profile says nothing about the computation of a run. Without that of
    the optimiser, its time is that of the data sheet's memory."""
    kinds = ("products", "attention", "layer", "loss")
    needed = (*(f"{kind}_{precision}" for kind in kinds), "copy")
    return [name for name in needed if name not in hardware.measured]


def check(hardware: HardwareConfig) -> None:
    """Raises BadInput, with one message, if a table has another name or other columns than scripts/matmul.py writes, or
    no row, or a figure that is not a positive number."""
    wrong = [text for name, rows in hardware.measured.items() if (text := _wrong(name, rows))]
    if wrong:
        message = f"the profile hardware={hardware.name} cannot be used: {'; '.join(wrong)}"
        raise BadInput(Problem("profile", message, HOW))


def _wrong(name: str, rows: Any) -> str:
    kind = next((kind for kind in COLUMNS if name == kind or name.startswith(f"{kind}_")), None)
    if kind is None:
        return f"hardware.measured.{name} is not a table of figures"
    if not isinstance(rows, list) or not rows:
        return f"hardware.measured.{name} is not a list of rows"
    width = sum(COLUMNS[kind])
    bad = next((row for row in rows if not _is_row(row, width, free=kind in FREE)), None)
    if bad is None:
        return ""
    return f"hardware.measured.{name} has the row {shortened(bad)}, but a row has {width} positive numbers"


def _is_row(row: Any, width: int, *, free: bool) -> bool:
    return (
        isinstance(row, list)
        and len(row) == width
        and all(isinstance(x, int | float) and math.isfinite(x) and (x > 0 or free) for x in row)
    )


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Latency and the time of each byte, from points of (bytes, time): the line with the least relative errors. None if
    one of them would be negative, or if there is one size only."""
    ones, sizes = [1 / time for _, time in points], [size / time for size, time in points]
    uu, vv = sum(one**2 for one in ones), sum(size**2 for size in sizes)
    uv = sum(one * size for one, size in zip(ones, sizes, strict=True))
    if len({size for size, _ in points}) == 1:
        return None
    determinant = uu * vv - uv**2
    latency, each = (sum(ones) * vv - sum(sizes) * uv) / determinant, (uu * sum(sizes) - uv * sum(ones)) / determinant
    return (latency, each) if latency >= 0 and each > 0 else None


def between(rows: Sequence[Sequence[float]], at: Sequence[float]) -> tuple[float, ...]:
    """The figures at a point, from rows of (point, figures), interpolated in log space.

    With one coordinate this is linear between the two neighbours, and constant beyond the ends. With several, the
    NEAREST points count by the inverse square of their distance (Shepard 1968), so that a measured point has its own
    figures.
    """
    return _between(tuple(map(tuple, rows)), tuple(at))


@lru_cache(MOST_KEPT)
def _between(rows: tuple[tuple[float, ...], ...], at: tuple[float, ...]) -> tuple[float, ...]:
    size = len(at)
    point = [math.log(x) for x in at]
    known = [([math.log(x) for x in row[:size]], row[size:]) for row in rows]
    if size == 1:
        known.sort(key=lambda one: one[0])
        below = [one for one in known if one[0] <= point][-1:]
        above = [one for one in known if one[0] > point][:1]
        ends = below + above
        weights = [abs(ends[1 - i][0][0] - point[0]) for i in range(2)] if len(ends) == 2 else [1.0]
    else:
        ends = sorted(known, key=lambda one: math.dist(one[0], point))[:NEAREST]
        distances = [math.dist(one[0], point) for one in ends]
        if distances[0] < 1e-9:
            return tuple(ends[0][1])
        weights = [distance**-2 for distance in distances]
    total = sum(weights)
    return tuple(
        math.exp(sum(weight * math.log(one[1][i]) for weight, one in zip(weights, ends, strict=True)) / total)
        for i in range(len(ends[0][1]))
    )
