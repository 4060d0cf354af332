"""The rules of context parallelism: what `cp` must divide."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule, degree_fixes, divisors, nearest
from train.config.shapes import kv_shards
from train.strategies.context.keys import CP_METHODS, ContextKeys


def method(plan: Plan) -> Finding | None:
    name = plan.keys(ContextKeys).cp_method
    if name in CP_METHODS:
        return None
    return Finding(f"strategy.cp_method={name} is not known", tuple(f"strategy.cp_method={m}" for m in CP_METHODS))


def two_chunks(plan: Plan) -> Finding | None:
    cp, seq_len = plan.degrees["cp"], plan.config.train.seq_len
    if seq_len % (2 * cp) == 0:
        return None
    message = f"train.seq_len={seq_len} is not divisible by 2 x strategy.cp={cp}"
    degrees = [d // 2 for d in divisors(seq_len) if d % 2 == 0]
    fixes = (*seq_len_fixes(plan), *degree_fixes(plan, "cp", nearest(degrees, cp)))
    return Finding(message, fixes, f"use a train.seq_len that {2 * cp} divides")


def tokens_and_tp(plan: Plan) -> Finding | None:
    cp, tp, seq_len = plan.degrees["cp"], plan.degrees["tp"], plan.config.train.seq_len
    if not plan.config.strategy.shards_sequence() or seq_len % cp or seq_len % tp or seq_len % (cp * tp) == 0:
        return None
    message = f"train.seq_len={seq_len} / strategy.cp={cp} is not divisible by strategy.tp={tp}"
    degrees = nearest([d for d in divisors(seq_len) if seq_len % (d * tp) == 0], cp)
    fixes = ("strategy.sequence_parallel=false", *seq_len_fixes(plan), *degree_fixes(plan, "cp", degrees))
    return Finding(message, fixes, f"use a train.seq_len that {cp * tp} divides")


def seq_len_fixes(plan: Plan) -> tuple[str, ...]:
    """Lengths near the given one that every axis can split, alone and with a model.max_seq_len that allows them."""
    unit = 2 * plan.degrees["cp"] * plan.degrees["tp"]
    below = plan.config.train.seq_len // unit * unit
    lengths = [length for length in (below, below + unit) if length]
    return (
        *(f"train.seq_len={length}" for length in lengths),
        *(f"train.seq_len={length} model.max_seq_len={length}" for length in lengths),
    )


def kv_heads(plan: Plan) -> Finding | None:
    """The check of the KV heads. Query heads need none, because their number is a multiple of the KV heads."""
    cp, tp, found = plan.degrees["cp"], plan.degrees["tp"], plan.config.model.num_kv_heads
    if plan.keys(ContextKeys).cp_method != "ulysses" or (found % tp and tp % found):
        return None
    own = found // kv_shards(plan.config.model, tp)
    if own % cp == 0:
        return None
    over = f" / strategy.tp={tp}" if tp > 1 else ""
    message = f"model.num_kv_heads={found}{over} is not divisible by strategy.cp={cp}, as cp_method=ulysses needs"
    unit = cp * tp
    heads = nearest([h for h in divisors(plan.config.model.num_heads) if h % unit == 0], found)
    fixes = (
        "strategy.cp_method=ring",
        *(f"model.num_kv_heads={h}" for h in heads),
        *degree_fixes(plan, "cp", nearest(divisors(own), cp)),
    )
    return Finding(message, fixes, "use another strategy.cp_method")


RULES = (
    Rule("cp_method", "attention over several ranks uses one of these methods", method),
    Rule("cp_sequence", "a rank has one chunk from the start and one from the end of a sequence", two_chunks),
    Rule("cp_tp_sequence", "sequence parallelism must split a rank's tokens evenly", tokens_and_tp),
    Rule("cp_kv_heads", "Ulysses gives every rank whole KV heads with their query heads", kv_heads),
)
