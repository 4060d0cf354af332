"""What layers are made of: norms, linear layers, sums, the messages of tensor parallelism, and the feed-forward."""

from __future__ import annotations

from train.command.planning.memory.sizes import Sizes
from train.command.planning.memory.tape import Tape, Value, Weight


def norm(t: Tape, s: Sizes, x: Value) -> Value:
    """CUDA's fused RMSNorm: it saves its input and 1 / rms of each token."""
    extra = s.wide * s.tokens / s.shards
    weight = Weight(float(s.dim * s.used), float(s.dim * s.kept))
    return t.apply(s.shard, (x, s.shard), saved=[x.buffer], extra=extra, weights=[weight])


def add(t: Tape, x: Value, y: Value) -> Value:
    return t.apply(x.buffer.size, (x, None), (y, None))


def linear(
    t: Tape, s: Sizes, x: Value, depth: int, columns: int, *, casts: bool | None = None, kept: bool = True
) -> Value:
    """A product with a weight. `casts`: whether the weight is cast before it is used; as layers do by default. `kept`:
    whether selective recomputation keeps the result."""
    casts = s.casts if casts is None else casts
    size, inputs = float(s.tokens * columns * s.used), float(s.tokens * depth * s.used)
    weight = Weight(float(depth * columns * s.used), float(depth * columns * s.kept))
    saved = [x.saved]
    if casts:
        saved.append(t.allocate(weight.low))
    y = t.apply(size, (x, inputs), saved=saved, weights=[weight], kept=kept)
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
    """Into a region with split weights: an all-gather of tokens, whose result may have to be put in order; or nothing
    forward and an all-reduce backward."""
    if not s.tp:
        return t.apply(None, (x, None))
    if s.sequence_parallel:
        whole = t.apply(s.row, (x, s.shard), scratch=(1 + s.copies) * s.row, back=s.copies * s.row)
        whole.source = x.buffer if s.gathers_again else None
        return whole
    return t.apply(None, (x, s.row))


def leave(t: Tape, s: Sizes, x: Value) -> Value:
    """Out of it: a reduce-scatter of tokens, or an all-reduce."""
    if not s.tp:
        return t.apply(None, (x, None))
    if s.sequence_parallel:
        return t.apply(s.shard, (x, s.row), scratch=s.copies * s.row + s.shard, back=s.copies * s.row)
    return t.apply(s.row, (x, None))


def feed_forward(t: Tape, s: Sizes, x: Value, hidden: int, *, whole: bool = False) -> Value:
    """`whole`: the input and the result are not those of a region with split weights, but inside one."""
    h = x if whole else enter(t, s, x)
    size = float(s.tokens * hidden * s.used)
    gate = linear(t, s, h, s.dim, hidden)
    active = activated(t, s, gate, size)
    up = linear(t, s, h, s.dim, hidden)
    # one compiled kernel of a recomputation makes the product and both gradients, before the product is multiplied
    again = size if s.compiled and t.stop_at is not None else 0.0
    product = t.apply(size, (active, size), (up, size), saved=[active.buffer, up.buffer], back=again)
    t.drop(active, up)
    a = linear(t, s, product, hidden, s.dim, kept=not s.compiled)  # no backward reads it, as a compiler sees
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
