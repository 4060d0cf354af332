"""Rules of the model and of the figures of a device that hold for every layout."""

from __future__ import annotations

from train.config.fields import MAX_FIGURE
from train.config.plan import Plan
from train.config.rule import Finding, Rule, divisors, nearest
from train.config.schema import Precision


def heads_split_the_width(plan: Plan) -> Finding | None:
    model = plan.config.model
    if model.dim % (2 * model.num_heads) == 0:
        return None
    message = f"model.dim={model.dim} / model.num_heads={model.num_heads} is not an even number"
    heads = nearest(divisors(model.dim // 2), model.num_heads)
    unit = 2 * model.num_heads
    fixes = [f"model.num_heads={h}" for h in heads] + [f"model.dim={max(round(model.dim / unit), 1) * unit}"]
    return Finding(message, tuple(fixes), "use an even model.dim")


def kv_heads_split_the_heads(plan: Plan) -> Finding | None:
    model = plan.config.model
    if model.num_heads % model.num_kv_heads == 0:
        return None
    message = f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.num_kv_heads}"
    options = nearest(divisors(model.num_heads), model.num_kv_heads)
    return Finding(message, tuple(f"model.num_kv_heads={k}" for k in options), "use one KV head for each head")


def sequence_fits(plan: Plan) -> Finding | None:
    longest, seq_len = plan.config.model.max_seq_len, plan.config.train.seq_len
    if longest >= seq_len:
        return None
    message = f"train.seq_len={seq_len} is more than model.max_seq_len={longest}"
    return Finding(message, (f"model.max_seq_len={seq_len}", f"train.seq_len={longest}"))


def ignored_token(plan: Plan) -> Finding | None:
    token, vocab_size = plan.config.data.ignore_token, plan.config.model.vocab_size
    if token is None or 0 <= token < vocab_size:
        return None
    message = f"data.ignore_token={token} is not a token id of a model with model.vocab_size={vocab_size}"
    return Finding(message, ("data.ignore_token=null",))


def peaks(plan: Plan) -> Finding | None:
    given, known = plan.config.hardware.peak_tflops, [precision.value for precision in Precision]
    if idle := [f"hardware.peak_tflops.{name}={peak:g}" for name, peak in given.items() if name not in known]:
        return Finding(f"{', '.join(idle)} does not name a precision", (), f"use one of {', '.join(known)}")
    return _not_a_rate("peak_tflops", given, "peak")


def rates(plan: Plan) -> Finding | None:
    return _not_a_rate("matmul_tflops", plan.config.hardware.matmul_tflops, "rate")


def _not_a_rate(table: str, given: dict[str, float], what: str) -> Finding | None:
    wrong = [f"hardware.{table}.{name}={value:g}" for name, value in given.items() if not 0 < value <= MAX_FIGURE]
    if not wrong:
        return None
    message = f"{', '.join(wrong)} is not a valid {what}"
    return Finding(message, (), f"use a value in TFLOP/s above 0 and at most {MAX_FIGURE:g}")


RULES = (
    Rule(
        "head_width", "each head has an even number of features, as RoPE rotates pairs of them", heads_split_the_width
    ),
    Rule("kv_heads", "every KV head serves the same number of query heads", kv_heads_split_the_heads),
    Rule("sequence_fits", "RoPE's table of angles has model.max_seq_len positions", sequence_fits),
    Rule("ignored_token", "the token without loss must be a token id of the model", ignored_token),
    Rule("peak_tflops", "MFU is a fraction of the peak, so the peak must be positive", peaks),
    Rule("matmul_tflops", "the planner divides by the rate of products, so the rate must be positive", rates),
)
