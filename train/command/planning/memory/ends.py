"""The embedding, the last norm, the head and the loss: what they save, and their peaks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from train.command.planning.memory.operators import enter, linear, norm
from train.command.planning.memory.sizes import Sizes
from train.command.planning.memory.tape import LOGITS, Buffer, Kinds, Tape, Value, Weight

INDEX = 8  # bytes of a token's number


@dataclass(frozen=True)
class Vocabulary:
    """`rows`: of the whole vocabulary. `own`: of this rank's part. `split_loss`: whether the loss is computed from
    parts of the logits. `casts`: whether the head casts its weight. `chunks`: of the tokens, with a loss each."""

    rows: int
    own: int
    degree: int
    split_loss: bool
    casts: bool
    chunks: int


@dataclass(frozen=True)
class HeadCost:
    """Bytes by kind. `kept`: from the forward on, as far as the backward needs it. `result`: what goes into the
    loss: the logits, or the hidden states if it makes the logits. `of_loss`: the part of `kept` that is freed after the
    loss's backward. `product`: the backward's peak after the loss. `keeps_result`: whether the loss keeps what goes
    into it. The others are as in `LayerCost`, but temporary tensors count as logits."""

    kept: Kinds
    result: Kinds
    forward: Kinds
    backward: Kinds
    first: Kinds
    product: Kinds
    product_first: Kinds
    weights: float
    inputs: float
    stashed: float
    of_loss: float
    keeps_result: bool


@cache
def head_cost(s: Sizes, v: Vocabulary) -> HeadCost:
    one, new, split = replayed(s, v), replayed(s, v, first=True), replayed(s, v, split=True)
    before, after = one.kept[LOGITS], split.tape.held[LOGITS]
    return HeadCost(
        one.kept,
        one.result,
        one.forward,
        one.loss,
        new.loss,
        one.product,
        new.product,
        new.tape.of_weights,
        inputs=max(split.loss[LOGITS], split.product[LOGITS]) - before,
        stashed=after - before - s.shard,
        of_loss=one.of_loss,
        keeps_result=s.tp and v.split_loss and v.chunks == 1,
    )


@dataclass(frozen=True)
class Replayed:
    """Of the head's program: what its forward keeps, what goes into the loss, the bytes that the loss keeps, the
    peaks of the forward, of the loss's backward and of the rest, and the tape at the end."""

    kept: Kinds
    result: Kinds
    of_loss: float
    forward: Kinds
    loss: Kinds
    product: Kinds
    tape: Tape


def replayed(s: Sizes, v: Vocabulary, *, first: bool = False, split: bool = False) -> Replayed:
    t = Tape(first=first, gathered=s.gathered, adds_up=s.adds_up)
    x = Value(Buffer(s.shard, "input", users=2))  # the last layer's result, which the layer counts
    h = norm(t, s, x)
    t.kind = LOGITS
    entered = enter(t, s, h)
    t.drop(h)
    if v.chunks == 1:
        result = weighted(t, s, v, entered)
        t.drop(entered)
        before = t.held[LOGITS] - result.buffer.size
        loss = cross_entropy(t, s, v, result)
    else:
        result = entered
        loss = in_chunks(t, s, v, result, split=split)
    forward = dict(t.at_peak)
    t.drop(result)
    kept = dict(t.held)
    of_loss = kept[LOGITS] - before if v.chunks == 1 else 0.0  # the gradients of chunks are also the weight's
    t.new_peak()
    t.backward(t.nodes[-1:], loss, t.allocate(0.0), split=split)
    at_loss = dict(t.at_peak)
    t.new_peak()
    assert result.grad is not None
    t.backward(t.nodes[:-1], result, result.grad, split=split)
    given = {result.buffer.kind: result.buffer.size}
    return Replayed(kept, given, of_loss, forward, at_loss, dict(t.at_peak), t)


def weighted(t: Tape, s: Sizes, v: Vocabulary, x: Value) -> Value:
    """The logits: the rank's part of them, or all if the loss needs all."""
    logits = linear(t, s, x, s.dim, v.own, casts=v.casts)
    if not s.tp or v.split_loss:
        return logits
    padded = -(-v.rows // v.degree)
    part, whole = (float(s.tokens * columns * s.used) for columns in (padded, padded * v.degree))
    back = 2 * part + (whole if padded * v.degree > v.rows else 0.0)
    every = t.apply(whole, (logits, logits.buffer.size), scratch=part + 2 * whole, back=back)
    t.drop(logits)
    return every


def cross_entropy(t: Tape, s: Sizes, v: Vocabulary, logits: Value) -> Value:
    """Computed in float32 at least. torch's keeps the logarithms of the softmax; the one that is split over ranks, and
    compiled code, keep the logits, and compute the softmax again."""
    size = logits.buffer.size
    wide = size * s.wide / s.used
    copy = wide if s.wide > s.used else 0.0
    if s.tp and v.split_loss:
        small = float(s.tokens * (s.wide + INDEX + 2))
        back, scratch = (wide - size, 0.0) if s.compiled else (3 * wide - size, 2 * wide + copy)
        return t.apply(0.0, (logits, size), saved=[logits.buffer], extra=small, scratch=scratch, back=back)
    if s.compiled:
        return t.apply(0.0, (logits, size), saved=[logits.buffer], extra=float(s.tokens * s.wide))
    return t.apply(0.0, (logits, size), extra=wide, scratch=wide + copy, back=2 * wide - size)


def in_chunks(t: Tape, s: Sizes, v: Vocabulary, x: Value, *, split: bool) -> Value:
    """The head and the loss, chunk by chunk, and both gradients, which are kept. The weight's adds up in float32 at
    least, beside a chunk's own where that is shorter. Each half of a split backward computes both."""
    elements = v.own * s.dim
    weight = Weight(float(elements * s.used), float(elements * s.kept))
    part = replace(s, tokens=-(-s.tokens // v.chunks))
    own = Tape(kind=LOGITS)
    logits = own.value(float(part.tokens * v.own * s.used))
    own.backward(own.nodes, cross_entropy(own, part, v, logits), own.allocate(0.0))
    product = weight.low if s.wide > s.used else 0.0
    scratch = s.row + elements * s.wide + max(own.peak, logits.buffer.size + product)
    scratch += weight.low if v.casts else 0.0
    back = weight.low if split else 0.0
    return t.apply(0.0, (x, s.row), extra=s.row + weight.low, weights=[weight], scratch=scratch, back=back)


@dataclass(frozen=True)
class EmbeddingCost:
    """Bytes. `kept`: the hidden states from the forward on. `forward`: the peak. `backward`: of the gradient from which
    the weight's, of `weight` bytes, is computed."""

    kept: float
    forward: float
    backward: float
    weight: float


def embedding_cost(s: Sizes, v: Vocabulary) -> EmbeddingCost:
    """Tokens are looked up in the weight's own dtype, and then cast. A split table gives zeros for other ranks' rows,
    and its sum over ranks is the message that leaves a split region."""
    looked_up = float(s.tokens * s.dim * s.kept)
    mask = s.shard / s.used if s.dropout else 0.0
    kept = s.shard + mask + s.tokens * INDEX * (s.tp or bool(s.cp))
    forward = (3 * looked_up if s.tp else looked_up) + s.shard + mask
    weight = float(v.own * s.dim * s.kept)
    return EmbeddingCost(kept, forward, looked_up, weight)
