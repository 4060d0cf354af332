"""Attention's kernels, on one rank and over the ranks of a context: what they save, and what they need for a moment."""

from __future__ import annotations

from dataclasses import dataclass

from train.command.planning.memory.sizes import Sizes
from train.command.planning.memory.tape import Tape, Value


@dataclass(frozen=True)
class Parts:
    """Bytes. `q`: of the rank's queries, and of the result; `kv`: of its keys, and of its values."""

    q: float
    kv: float
    log_sums: float


def parts_of(s: Sizes) -> Parts:
    n = s.tokens
    return Parts(float(n * s.queries * s.used), float(n * s.keys * s.used), float(4 * n * s.heads))


def attend(t: Tape, s: Sizes, q: Value, k: Value, v: Value) -> Value:
    """The result as the input of the product that follows."""
    p = parts_of(s)
    if s.cp == "ulysses":
        return in_rows(t, p, exchanged(t, s, p, q, k, v))
    if s.cp:
        return (ring if s.cp == "ring" else gathered)(t, s, p, q, k, v)
    out = kernel(t, s, p, q, k, v)
    return out if s.kernel == "fused" else in_rows(t, p, out)


def in_rows(t: Tape, p: Parts, out: Value) -> Value:
    """A copy with the heads of a token side by side; the other kernels write them so."""
    rows = t.apply(p.q, (out, None))
    t.drop(out)
    return rows


def kernel(t: Tape, s: Sizes, p: Parts, q: Value, k: Value, v: Value) -> Value:
    """Attention on one rank, or of some of the heads. `math` and `eager` keep the scores of every head, in float32 at
    least, and copies of queries, keys and values, repeated for the heads that share them."""
    inputs = ((q, p.q), (k, p.kv), (v, p.kv))
    if s.kernel == "fused":
        saved = [q.buffer, k.buffer, v.buffer]
        sums = p.log_sums
        return t.apply(p.q, *inputs, saved=saved, saves_result=True, extra=sums, kept=True, pieces=sums)
    elements = float(s.tokens * s.heads * s.seq_len)
    scores, copy = s.wide * elements, p.q * s.wide / s.used
    rounded = s.used * elements if s.kernel == "eager" and s.used < s.wide else 0.0
    mask = float(s.seq_len**2) if s.kernel == "eager" else 0.0
    shares = t.apply(
        rounded or scores,
        *inputs[:2],
        saves_result=not rounded,
        extra=2 * copy + mask + (scores if rounded else 0.0),
        scratch=2 * scores,
        back=2 * scores - (rounded or scores) - p.q - p.kv,
    )
    out = t.apply(p.q, (shares, shares.buffer.size), inputs[2], saved=[shares.buffer], extra=copy)
    t.drop(shares)
    return out


def block_scores(s: Sizes, keys: float) -> float:
    """Bytes of the scores of half of the rank's queries with so many keys, where they are in memory."""
    return 0.0 if s.kernel == "fused" and s.used == 2 else s.tokens / 2 * s.heads * keys * s.wide


def gathered(t: Tape, s: Sizes, p: Parts, q: Value, k: Value, v: Value) -> Value:
    """Keys and values of all ranks are gathered, and put into the sequence's order."""
    whole, wide = 2 * p.kv * s.cp_degree, s.wide / s.used
    both = t.apply(whole, (k, p.kv), (v, p.kv), scratch=3 * whole, back=1.5 * whole)
    share = 1 - (1 + s.cp_index) / (2 * s.cp_degree)  # of the keys, those before the rank's second part
    scores, largest = block_scores(s, s.seq_len * share), whole * share
    by_kv_head = p.q if s.heads != s.kv_heads else 0.0
    in_memory = by_kv_head + max(p.q / 2 + 3 * scores, p.q + 2 * scores + largest)
    copies = in_memory if scores else 2 * (p.q + largest)
    out = t.apply(
        p.q,
        (q, p.q),
        (both, whole),
        saved=[q.buffer, both.buffer],
        saves_result=True,
        extra=p.log_sums,
        scratch=whole + wide * 2.5 * p.q + p.q / 2 + 3 * scores,
        pieces=0.0 if scores else (2.0 if s.cp_index else 1.5) * (p.q + p.log_sums),
        back=(wide - 1) * (p.q + whole) + copies,
    )
    t.drop(both)
    return out


def ring(t: Tape, s: Sizes, p: Parts, q: Value, k: Value, v: Value) -> Value:
    """Keys and values pass from rank to rank; their gradients follow them in the wide dtype."""
    wide, several = s.wide / s.used, s.cp_degree > 1
    message = 2 * p.kv * (1 + wide) if several else 0.0
    scores = 2 * block_scores(s, s.seq_len / s.cp_degree)
    by_kv_head = 3 * p.q if s.heads != s.kv_heads else 0.0
    back = (wide + 0.5) * p.q + 4 * message - 2 * p.kv
    if scores:
        back = (wide - 1) * p.q + 2 * wide * p.kv + 2 * p.kv + by_kv_head + 3 * scores
    return t.apply(
        p.q,
        (q, p.q),
        (k, p.kv),
        (v, p.kv),
        saved=[q.buffer, k.buffer, v.buffer],
        saves_result=True,
        extra=p.log_sums,
        scratch=8 * p.kv + wide * 4 * p.q + p.q + 3 * scores,
        pieces=0.0 if scores else (s.cp_degree + 1) / 2 * (p.q + p.log_sums),
        back=back,
    )


def exchanged(t: Tape, s: Sizes, p: Parts, q: Value, k: Value, v: Value) -> Value:
    """Tokens are exchanged for heads and back, around the ordinary kernel."""
    every = p.q + 2 * p.kv
    whole = t.apply(every, (q, p.q), (k, p.kv), (v, p.kv), scratch=3 * every, back=2 * every)
    if s.kernel == "fused":
        extra = p.log_sums
        out = t.apply(p.q, (whole, every), saved=[whole.buffer], saves_result=True, extra=extra, back=every, kept=True)
    else:
        out = kernel(t, s, p, *(Value(t.keep(whole.buffer)) for _ in range(3)))
    back = t.apply(p.q, (out, p.q), scratch=2 * p.q, back=2 * p.q)
    t.drop(whole, out)
    return back
