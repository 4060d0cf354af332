"""Rules of tensor parallelism: what `tp` divides."""

from __future__ import annotations

from collections.abc import Callable

from train.config.plan import Plan
from train.config.rule import Finding, Rule, below, degree_fixes, divisors, nearest


def tp_divides(name: str, value: Callable[[Plan], int]) -> Callable[[Plan], Finding | None]:
    def check(plan: Plan) -> Finding | None:
        tp, found = plan.degrees["tp"], value(plan)
        if found % tp == 0:
            return None
        message = f"{name}={found} is not divisible by strategy.tp={tp}"
        return Finding(message, degree_fixes(plan, "tp", nearest(divisors(found), tp)), "use a smaller strategy.tp")

    return check


def kv_heads(plan: Plan) -> Finding | None:
    """With more ranks than KV heads, each head is held by `tp` / `num_kv_heads` ranks."""
    tp, found = plan.degrees["tp"], plan.config.model.num_kv_heads
    if found % tp == 0 or tp % found == 0:
        return None
    message = f"model.num_kv_heads={found} and strategy.tp={tp}: neither divides the other"
    degrees = [d for d in divisors(plan.config.model.num_heads) if found % d == 0 or d % found == 0]
    return Finding(message, degree_fixes(plan, "tp", nearest(degrees, tp)), "use strategy.tp=1")


def sequence_length(plan: Plan) -> int:
    """0, which everything divides, where the sequence is not sharded."""
    return plan.config.train.seq_len if plan.option("sequence_parallel", False) else 0


def vocabulary(plan: Plan) -> Finding | None:
    tp, rows = plan.degrees["tp"], plan.config.model.vocab_size
    if -(-rows // tp) * (tp - 1) < rows or not plan.option("tp_splits_vocabulary", True):
        return None
    message = f"model.vocab_size={rows} in strategy.tp={tp} shards of {-(-rows // tp)} leaves ranks without rows"
    return Finding(message, degree_fixes(plan, "tp", below(tp)), "use a smaller strategy.tp")


def model_size(field: str) -> Callable[[Plan], int]:
    return lambda plan: int(getattr(plan.config.model, field))


def dense_columns(plan: Plan) -> int:
    """0 where no feed-forward is dense."""
    return 0 if plan.config.model.num_experts else plan.config.model.ffn_dim


def async_tp(plan: Plan) -> Finding | None:
    """What of it can be known before a device is chosen; `Spmd.needed_backend` says the rest."""
    if not plan.option("async_tp", False):
        return None
    runtime, needed = plan.config.runtime, []
    if "tp" not in plan.axes:
        needed.append("strategy.tp=-1")
    if not plan.option("sequence_parallel", True):
        needed.append("strategy.sequence_parallel=true")
    if not plan.config.compile.enabled:
        needed.append("compile.enabled=true")
    if runtime.device == "cpu":
        needed.append("runtime.device=auto")
    if runtime.backend == "gloo":
        needed.append("runtime.backend=auto")
    if not needed:
        return None
    message = f"strategy.async_tp=true needs {', '.join(needed)}"
    return Finding(message, (" ".join(needed), "strategy.async_tp=false"))


RULES = (
    Rule("tp_heads", "a rank has whole heads", tp_divides("model.num_heads", model_size("num_heads"))),
    Rule("tp_kv_heads", "a rank has whole KV heads, or shares one with as many ranks as share any other", kv_heads),
    Rule("tp_ffn", "feed-forward columns are split evenly", tp_divides("model.ffn_dim", dense_columns)),
    Rule("tp_vocab", "every rank has rows of the vocabulary", vocabulary),
    Rule("async_tp", "the compiler fuses gathers and scatters of NCCL with products", async_tp),
    Rule("tp_sequence", "sequence parallelism splits evenly", tp_divides("train.seq_len", sequence_length)),
)
