"""The rules of tensor parallelism: what `tp` must divide."""

from __future__ import annotations

from collections.abc import Callable

from train.config.plan import Plan
from train.config.rule import Finding, Rule, below, degree_fixes, divides, divisors, nearest
from train.strategies.tensor.keys import TensorKeys


def kv_heads(plan: Plan) -> Finding | None:
    """With more ranks than KV heads, `tp` / `num_kv_heads` ranks hold each head."""
    tp, found = plan.degrees["tp"], plan.config.model.num_kv_heads
    if found % tp == 0 or tp % found == 0:
        return None
    message = f"model.num_kv_heads={found} and strategy.tp={tp}: neither divides the other"
    degrees = [d for d in divisors(plan.config.model.num_heads) if found % d == 0 or d % found == 0]
    return Finding(message, degree_fixes(plan, "tp", nearest(degrees, tp)), "use strategy.tp=1")


def sequence_length(plan: Plan) -> int:
    """The length that `tp` must divide: 0, which every number divides, if the sequence is not sharded."""
    return plan.config.train.seq_len if plan.config.strategy.shards_sequence() else 0


def vocabulary(axis: str) -> Callable[[Plan], Finding | None]:
    """The check that every rank of `axis` has rows of the vocabulary."""

    def check(plan: Plan) -> Finding | None:
        degree, rows = plan.degrees[axis], plan.config.model.vocab_size
        size = -(-rows // degree)
        if size * (degree - 1) < rows:
            return None
        message = f"model.vocab_size={rows} in strategy.{axis}={degree} shards of {size} leaves ranks without rows"
        return Finding(message, degree_fixes(plan, axis, below(degree)), f"use a smaller strategy.{axis}")

    return check


def model_size(field: str) -> Callable[[Plan], int]:
    return lambda plan: int(getattr(plan.config.model, field))


def dense_columns(plan: Plan) -> int:
    """The width that `tp` must divide: 0, which every number divides, if no feed-forward is dense."""
    return 0 if plan.config.model.num_experts else plan.config.model.ffn_dim


def expert_columns(plan: Plan) -> int:
    return plan.config.model.expert_ffn_dim if plan.config.model.num_experts else 0


def async_tp(plan: Plan) -> Finding | None:
    """The requirements that can be checked before a device is chosen; `TensorKeys.needed_backend` has the others."""
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


BLOCK_RULES = (  # for everything that splits blocks over `tp`, including DeepSpeed's AutoTP
    Rule("tp_heads", "every rank needs whole heads", divides("tp", "model.num_heads", model_size("num_heads"))),
    Rule("tp_kv_heads", "every rank needs whole KV heads, or equally many ranks must share each one", kv_heads),
    Rule("tp_ffn", "feed-forward columns must split evenly", divides("tp", "model.ffn_dim", dense_columns)),
)
RULES = (
    *BLOCK_RULES,
    Rule("tp_vocab", "every rank needs rows of the vocabulary", vocabulary("tp")),
    Rule("async_tp", "the compiler fuses NCCL's gathers and scatters with matrix products", async_tp),
    Rule("tp_sequence", "the sequence must split evenly", divides("tp", "train.seq_len", sequence_length)),
    Rule("tp_expert_ffn", "experts' columns must split evenly", divides("tp", "model.expert_ffn_dim", expert_columns)),
)
