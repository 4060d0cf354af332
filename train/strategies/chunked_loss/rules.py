"""The rules of a loss that is computed in chunks."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.schema import Precision
from train.config.traffic import tokens_of

OFF = "train.loss_chunks=1"


def said(plan: Plan) -> str:
    return f"train.loss_chunks={plan.config.train.loss_chunks}"


def tokens(plan: Plan) -> Finding | None:
    found = tokens_of(plan)
    if plan.config.train.loss_chunks <= found:
        return None
    message = f"{said(plan)} is more than the {found} tokens of a rank's microbatch"
    return Finding(message, (f"train.loss_chunks={found}", OFF), "use fewer chunks")


def own_logits(plan: Plan) -> Finding | None:
    if "tp" not in plan.axes or plan.config.strategy.shards_logits():
        return None
    message = f"{said(plan)} is not supported with strategy.loss_parallel=false"
    return Finding(message, ("strategy.loss_parallel=true", OFF))


def teacher(plan: Plan) -> Finding | None:
    found = plan.config.train.teacher
    if found is None:
        return None
    return Finding(f"{said(plan)} is not supported with train.teacher={found}", (OFF, "train.teacher=null"))


def eight_bits(plan: Plan) -> Finding | None:
    """Gradients that enter the blocks are rounded to bf16 before they are divided by the number of tokens, and then to
    8 bits: often to other numbers than on one device."""
    if plan.config.precision is not Precision.fp8:
        return None
    return Finding(f"{said(plan)} is not supported with precision=fp8", (OFF, "precision=bf16"))


RULES = (
    Rule("chunk_tokens", "every chunk of the loss needs a token", tokens),
    Rule("chunk_logits", "a chunk's loss is computed from a rank's own part of the logits", own_logits),
    Rule("chunk_fp8", "gradients that are scaled after a product are rounded to other numbers of 8 bits", eight_bits),
    Rule("chunk_teacher", "the teacher's logits are those of a whole microbatch", teacher),
)
