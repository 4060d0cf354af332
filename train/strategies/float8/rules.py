"""The rules of products in 8 bits."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules.linears import input_widths, split_by_tp
from train.config.schema import Qat

FP8_SINCE = (8, 9)  # the compute capability of GPUs that multiply 8-bit numbers
MULTIPLE = 16  # a GPU multiplies 8-bit matrices whose sides are multiples of it
OFF = "precision=bf16"


def whole_weights(plan: Plan) -> Finding | None:
    return split_by_tp(plan, "precision=fp8", "", OFF)


def sides(plan: Plan) -> Finding | None:
    model, train = plan.config.model, plan.config.train
    kv_width = model.dim // model.num_heads * model.num_kv_heads
    tokens = train.micro_batch_size * (train.seq_len // plan.degrees["cp"])
    found = {**input_widths(model), "the width of all KV heads": kv_width, "a rank's tokens per microbatch": tokens}
    for name, size in found.items():
        if size % MULTIPLE:
            message = f"precision=fp8 multiplies matrices whose sides are multiples of {MULTIPLE}, but {name} is {size}"
            return Finding(message, (OFF,))
    return None


def rounded_once(plan: Plan) -> Finding | None:
    qat = plan.config.train.qat
    if qat is Qat.none:
        return None
    message = f"train.qat={qat.value} is not supported with precision=fp8"
    return Finding(message, (OFF, "train.qat=none"))


RULES = (
    Rule("fp8_weights", "products in 8 bits are of whole weights", whole_weights),
    Rule("fp8_sides", "the hardware multiplies 8-bit matrices in blocks", sides),
    Rule("fp8_qat", "a linear layer rounds its numbers in one way", rounded_once),
)
