"""A transformer layer as a program of a tape. It follows `train/model/transformer.py` and what tensor parallelism changes
in it, line by line: a reference that the code drops is dropped here.
"""

from __future__ import annotations

from launch.planning.memory.attention import attend
from launch.planning.memory.feed_forward import feed_forward
from launch.planning.memory.mixture import mixture
from launch.planning.memory.operators import add, dropped, enter, leave, linear, norm
from launch.planning.memory.sizes import Sizes
from launch.planning.memory.tape import Tape, Value


def layer(t: Tape, s: Sizes, x: Value) -> Value:
    h = norm(t, s, x)
    a = dropped(t, s, attention(t, s, h))
    t.drop(h)
    y = add(t, x, a)
    t.drop(a)
    h = norm(t, s, y)
    m = dropped(t, s, mixture(t, s, h) if s.experts else feed_forward(t, s, h, s.hidden))
    t.drop(h)
    z = add(t, y, m)
    t.drop(m, y)
    return z


def attention(t: Tape, s: Sizes, x: Value) -> Value:
    h = enter(t, s, x)
    q, k, v = (linear(t, s, h, s.dim, columns) for columns in (s.queries, s.keys, s.keys))
    turned = [rotate(t, s, one, columns) for one, columns in ((q, s.queries), (k, s.keys))]
    t.drop(q, k)
    out = attend(t, s, *turned, v)
    a = linear(t, s, out, s.queries, s.dim)
    b = leave(t, s, a)
    t.drop(a, *turned, v, out, h)
    return b


def rotate(t: Tape, s: Sizes, x: Value, columns: int) -> Value:
    """Rotary positions, in float32 at least; the pairs' products are temporary. Compiled code fuses them."""
    n, wide = s.tokens * columns, s.wide
    casts = wide > s.used
    forward, back = (2 + casts) * wide * n, (3 * wide - 2 * s.used if casts else wide) * n
    size = float(n * s.used)
    if s.compiled:
        return t.apply(size, (x, size))
    return t.apply(size, (x, size), scratch=float(forward), back=float(back))
