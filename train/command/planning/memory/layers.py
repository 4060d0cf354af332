"""A transformer layer as a program of a tape, and what it adds to a rank's memory, forward and backward.

The program follows `train/model/transformer.py` and what tensor parallelism changes in it, line by line: a reference
that the code drops is dropped here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from train.command.planning.memory.attention import attend
from train.command.planning.memory.mixture import mixture
from train.command.planning.memory.operators import add, dropped, enter, feed_forward, leave, linear, norm
from train.command.planning.memory.sizes import Sizes
from train.command.planning.memory.tape import TEMPORARY, Buffer, Kinds, Tape, Value
from train.config.schema import ActivationCheckpointing


@dataclass(frozen=True)
class LayerCost:
    """Bytes by kind, on top of what there is before. `kept`: activations from a layer's forward on, with its result and
    without its input. `forward`, `backward`: at the peaks. `first`: the backward's peak while weights have no gradients
    yet. `received`: if the gradient of the result is a buffer of the schedule. `result`: of the layer's result, which
    `backward` does not count. `weights`: of their gradients. `inputs`: the temporary peak of a backward for the inputs
    only, and `stashed`, what it leaves for the weights'."""

    kept: float
    forward: Kinds
    backward: Kinds
    first: Kinds
    received: Kinds
    received_first: Kinds
    result: float
    weights: float
    inputs: float
    stashed: float


@cache
def layer_cost(s: Sizes, mode: ActivationCheckpointing) -> LayerCost:
    kept, forward, t = replayed(s, mode)
    _, _, first = replayed(s, mode, first=True)
    received, received_first = (replayed(s, mode, first=new, received=True)[-1].at_peak for new in (False, True))
    _, _, split = replayed(s, mode, split=True)
    stashed = split.held[TEMPORARY] - s.shard  # the gradient of the input goes on
    peak = split.at_peak[TEMPORARY]
    return LayerCost(
        kept,
        forward,
        t.at_peak,
        first.at_peak,
        received,
        received_first,
        result=s.shard,
        weights=first.of_weights,
        inputs=peak,
        stashed=stashed,
    )


def replayed(
    s: Sizes, mode: ActivationCheckpointing, *, first: bool = False, split: bool = False, received: bool = False
) -> tuple[float, Kinds, Tape]:
    """(bytes that the forward keeps, its peak, the tape after the backward) of one layer."""
    t = Tape(first=first, gathered=s.gathered, adds_up=s.adds_up)
    x = Value(Buffer(s.shard, "input", users=2))  # not counted: the layer before made it, and a node there keeps it
    t.recording = mode is ActivationCheckpointing.none
    t.kept = [] if mode is ActivationCheckpointing.selective else None
    out = layer(t, s, x)
    kept, forward, saves, held = t.total, dict(t.at_peak), t.saves, t.kept or []
    t.kept, t.kind = None, TEMPORARY
    if not split:
        t.drop(out)
    t.new_peak()
    gradient = t.allocate(0.0 if received else s.shard)
    if mode is not ActivationCheckpointing.none:
        t.recording, t.saves, t.stop_at, t.replayed = True, 0, saves, list(held)
        out = layer(t, s, Value(x.buffer))
        t.drop(out)
    left = list(t.replayed or [])
    t.backward(t.nodes, out, gradient, split=split)
    if not split:
        t.release(left)
    return kept, forward, t


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
    turned_q, turned_k = rotate(t, s, q, s.queries), rotate(t, s, k, s.keys)
    t.drop(q, k)
    out = attend(t, s, turned_q, turned_k, v)
    a = linear(t, s, out, s.queries, s.dim)
    b = leave(t, s, a)
    t.drop(a, turned_q, turned_k, v, out, h)
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
