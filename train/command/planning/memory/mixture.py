"""A mixture of experts as a program of a tape, with as many rows for every expert (`train/model/moe.py`).

Letters: N tokens, D width, E experts, K of them for a token, R = N K rows, F an expert's columns on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from train.command.planning.memory.operators import activated, enter, feed_forward, leave
from train.command.planning.memory.sizes import Sizes
from train.command.planning.memory.tape import Buffer, Tape, Value, Weight

INDEX = 8  # bytes of an index


def mixture(t: Tape, s: Sizes, x: Value) -> Value:
    h = enter(t, s, x)
    gates = router(t, s, h)
    y = dispatched(t, s, h)
    weighted = t.apply(s.row, (gates, gates.buffer.size), (y, y.buffer.size), saved=[y.buffer], extra=0.0)
    t.drop(y, gates)
    if s.shared_hidden:
        shared = feed_forward(t, s, h, s.shared_hidden, whole=True)
        both = t.apply(s.row, (weighted, None), (shared, None))
        t.drop(weighted, shared)
        weighted = both
    out = leave(t, s, weighted)
    t.drop(weighted, h)
    return out


def router(t: Tape, s: Sizes, x: Value) -> Value:
    """The gates. Scores are computed in float32 at least, from a copy of the tokens in this dtype."""
    n, wide = s.tokens, s.wide
    copy = float(n * s.dim * wide) if wide > s.used else 0.0
    small = float(n * s.experts * wide + n * s.top_k * (INDEX + 2 * wide + s.used))
    saved = [] if copy else [x.buffer]
    weight = Weight(float(s.experts * s.dim * s.used), float(s.experts * s.dim * s.kept))
    gates = float(n * s.top_k * wide)
    return t.apply(gates, (x, s.row), saved=saved, extra=copy + small, weights=[weight], back=copy)


def dispatched(t: Tape, s: Sizes, x: Value) -> Value:
    """Rows are sorted by expert, and sent to the ranks that have the experts, and back."""
    rows = s.row * s.top_k
    order = float(s.tokens * s.top_k * INDEX)
    there = gather(t, x, rows, s.row, order)
    arrived = send(t, there, rows) if s.exchanges else None
    if arrived is not None:
        there = gather(t, arrived, rows, rows, order)
    y = experts(t, s, there, rows)
    t.drop(there)
    if arrived is None:
        return moved(t, y, rows, order)
    y = moved(t, send(t, moved(t, y, rows, order), rows), rows, order)
    t.drop(arrived)
    return y


def gather(t: Tape, x: Value, rows: float, back: float, order: float) -> Value:
    """Rows in another order. The backward gathers gradients, and sums those of a token."""
    return t.apply(rows, (x, back), extra=order, back=rows)


def moved(t: Tape, x: Value, rows: float, order: float) -> Value:
    y = gather(t, x, rows, rows, order)
    t.drop(x)
    return y


def send(t: Tape, x: Value, rows: float) -> Value:
    y = t.apply(rows, (x, rows))
    t.drop(x)
    return y


def experts(t: Tape, s: Sizes, x: Value, rows: float) -> Value:
    """Three products with all experts' weights, which are cast together if they are cast."""
    elements = float(s.own_experts * s.expert_hidden * s.dim)
    weight = Weight(elements * s.used, elements * s.kept)
    casts = [t.allocate(weight.low) for _ in range(3)] if s.casts else []
    y = (grouped if s.groups else one_by_one)(t, s, x, rows, weight, casts)
    t.release(casts)
    return y


def grouped(t: Tape, s: Sizes, x: Value, rows: float, weight: Weight, casts: Sequence[Buffer]) -> Value:
    """By CUDA's grouped product, which selective recomputation does not keep."""
    hidden = hidden_bytes(s)

    def product(size: float, of: Value, back: float, i: int) -> Value:
        return t.apply(size, (of, back), saved=[of.buffer, *casts[i : i + 1]], weights=[weight])

    joined = gated(t, s, hidden, product(hidden, x, rows, 0), lambda: product(hidden, x, rows, 1))
    y = product(rows, joined, hidden, 2)
    t.drop(joined)
    return y


def one_by_one(t: Tape, s: Sizes, x: Value, rows: float, weight: Weight, casts: Sequence[Buffer]) -> Value:
    """An expert after the other. The gradients of all experts' weights, and of their rows, wait for the last ones."""
    n = s.own_experts
    parts = t.pieces(n, (x, rows))
    gates, ups, downs = (t.pieces(n, weights=[weight]) for _ in range(3))
    hidden = hidden_bytes(s) / n

    def product(size: float, of: Value, back: float, matrix: Value, i: int) -> Value:
        saved = [of.buffer, *casts[i : i + 1]]
        return t.apply(size, (of, back), (matrix, weight.low / n), saved=saved, kept=True)

    def expert(part: Value, gate: Value, up: Value, down: Value) -> Value:
        back = rows / n
        first = product(hidden, part, back, gate, 0)
        joined = gated(t, s, hidden, first, lambda: product(hidden, part, back, up, 1))
        y = product(back, joined, hidden, down, 2)
        t.drop(joined)
        return y

    found = [expert(*of) for of in zip(parts, gates, ups, downs, strict=True)]
    y = t.apply(rows, *((one, None) for one in found))
    t.drop(*found, *parts, *gates, *ups, *downs)
    return y


def hidden_bytes(s: Sizes) -> float:
    return float(s.tokens * s.top_k * s.expert_hidden * s.used)


def gated(t: Tape, s: Sizes, hidden: float, first: Value, other: Callable[[], Value]) -> Value:
    active = activated(t, s, first, hidden)
    second = other()
    joined = t.apply(hidden, (active, hidden), (second, hidden), saved=[active.buffer, second.buffer])
    t.drop(active, second)
    return joined
