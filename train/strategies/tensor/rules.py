"""Rules of tensor parallelism: what `tp` divides."""

from __future__ import annotations

from collections.abc import Callable

from train.config.plan import Plan
from train.config.rule import Finding, Rule, below, degree_fixes, divides, divisors, nearest
from train.strategies.tensor.keys import TensorKeys


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
    return plan.config.train.seq_len if plan.config.strategy.shards_sequence() else 0


def vocabulary(plan: Plan) -> Finding | None:
    tp, rows = plan.degrees["tp"], plan.config.model.vocab_size
    if -(-rows // tp) * (tp - 1) < rows:
        return None
    message = f"model.vocab_size={rows} in strategy.tp={tp} shards of {-(-rows // tp)} leaves ranks without rows"
    return Finding(message, degree_fixes(plan, "tp", below(tp)), "use a smaller strategy.tp")


def model_size(field: str) -> Callable[[Plan], int]:
    return lambda plan: int(getattr(plan.config.model, field))


def dense_columns(plan: Plan) -> int:
    """0 where no feed-forward is dense."""
    return 0 if plan.config.model.num_experts else plan.config.model.ffn_dim


def expert_columns(plan: Plan) -> int:
    return plan.config.model.expert_ffn_dim if plan.config.model.num_experts else 0


def async_tp(plan: Plan) -> Finding | None:
    """What of it can be known before a device is chosen; `TensorKeys.needed_backend` says the rest."""
    keys, runtime = plan.keys(TensorKeys), plan.config.runtime
    if not keys.async_tp:
        return None
    needed = []
    if not keys.sequence_parallel:
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


BLOCK_RULES = (  # of all that splits blocks over `tp`, DeepSpeed's AutoTP too
    Rule("tp_heads", "a rank has whole heads", divides("tp", "model.num_heads", model_size("num_heads"))),
    Rule("tp_kv_heads", "a rank has whole KV heads, or shares one with as many ranks as share any other", kv_heads),
    Rule("tp_ffn", "feed-forward columns are split evenly", divides("tp", "model.ffn_dim", dense_columns)),
)
RULES = (
    *BLOCK_RULES,
    Rule("tp_vocab", "every rank has rows of the vocabulary", vocabulary),
    Rule("async_tp", "the compiler fuses gathers and scatters of NCCL with products", async_tp),
    Rule("tp_sequence", "sequence parallelism splits evenly", divides("tp", "train.seq_len", sequence_length)),
    Rule("tp_expert_ffn", "experts' columns are split evenly", divides("tp", "model.expert_ffn_dim", expert_columns)),
)
