"""The operators that layers are made of: norms, linear layers, sums, and the messages of tensor parallelism."""

from __future__ import annotations

from launch.planning.memory.sizes import Sizes
from launch.planning.memory.tape import Tape, Value, Weight


def norm(t: Tape, s: Sizes, x: Value) -> Value:
    """CUDA's fused RMSNorm: it saves its input and 1 / rms of each token."""
    extra = s.wide * s.tokens / s.shards
    weight = Weight(float(s.dim * s.used), float(s.dim * s.kept))
    return t.apply(s.shard, (x, s.shard), saved=[x.buffer], extra=extra, weights=[weight])


def add(t: Tape, x: Value, y: Value) -> Value:
    return t.apply(x.buffer.size, (x, None), (y, None))


def linear(t: Tape, s: Sizes, x: Value, depth: int, columns: int, *, casts: bool | None = None) -> Value:
    """A product with a weight. `casts`: whether the weight is cast before it is used; as layers do by default."""
    casts = s.casts if casts is None else casts
    size, inputs = float(s.tokens * columns * s.used), float(s.tokens * depth * s.used)
    weight = Weight(float(depth * columns * s.used), float(depth * columns * s.kept))
    saved = [x.buffer]
    if casts:
        saved.append(t.allocate(weight.low))
    y = t.apply(size, (x, inputs), saved=saved, weights=[weight], kept=True)
    if casts:
        t.free(saved[-1])
    return y


def dropped(t: Tape, s: Sizes, x: Value) -> Value:
    """Dropout: CUDA's kernel saves a mask of one byte an element."""
    if not s.dropout:
        return x
    y = t.apply(x.buffer.size, (x, x.buffer.size), extra=x.buffer.size / s.used)
    t.drop(x)
    return y


def enter(t: Tape, s: Sizes, x: Value) -> Value:
    """Into a region with split weights: an all-gather over the sequence, whose result is put in order; or nothing
    forward and an all-reduce backward."""
    if not s.tp:
        return t.apply(None, (x, None))
    if s.sequence_parallel:
        return t.apply(s.row, (x, s.shard), scratch=2 * s.row, back=s.row)
    return t.apply(None, (x, s.row))


def leave(t: Tape, s: Sizes, x: Value) -> Value:
    """Out of it: a reduce-scatter over the sequence, or an all-reduce."""
    if not s.tp:
        return t.apply(None, (x, None))
    if s.sequence_parallel:
        return t.apply(s.shard, (x, s.row), scratch=s.row + s.shard, back=s.row)
    return t.apply(s.row, (x, None))
