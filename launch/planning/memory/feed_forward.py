"""A dense feed-forward as a program of a tape: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from launch.planning.memory.operators import enter, leave, linear
from launch.planning.memory.sizes import Sizes
from launch.planning.memory.tape import Tape, Value


def feed_forward(t: Tape, s: Sizes, x: Value, hidden: int, *, whole: bool = False) -> Value:
    """`whole`: the input and the result are not those of a region with split weights, but inside one."""
    h = x if whole else enter(t, s, x)
    size = float(s.tokens * hidden * s.used)
    gate = linear(t, s, h, s.dim, hidden)
    active = activated(t, s, gate, size)
    up = linear(t, s, h, s.dim, hidden)
    product = t.apply(size, (active, size), (up, size), saved=[active.buffer, up.buffer])
    t.drop(active, up)
    a = linear(t, s, product, hidden, s.dim)
    if whole:
        t.drop(product)
        return a
    b = leave(t, s, a)
    t.drop(a, product, h)
    return b


def activated(t: Tape, s: Sizes, gate: Value, size: float) -> Value:
    """silu(gate), which the compiler fuses with the multiplication that follows."""
    if s.compiled:
        return gate
    active = t.apply(size, (gate, size), saved=[gate.buffer])
    t.drop(gate)
    return active
