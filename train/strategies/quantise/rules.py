"""The rules of quantisation-aware training."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules.linears import input_widths, split_by_tp

GROUP = 32  # neighbouring inputs of a linear layer whose weights share a scale
OFF = "train.qat=none"


def said(plan: Plan) -> str:
    return f"train.qat={plan.config.train.qat.value}"


def whole_tokens(plan: Plan) -> Finding | None:
    return split_by_tp(plan, said(plan), ", under which no rank has all features of a token", OFF)


def whole_groups(plan: Plan) -> Finding | None:
    for name, width in input_widths(plan.config.model).items():
        if width % GROUP:
            whole = max(round(width / GROUP), 1) * GROUP
            fixes = (f"{name}={whole}", OFF) if " " not in name else (OFF,)
            return Finding(f"{said(plan)} rounds groups of {GROUP} weights, which do not divide {name}={width}", fixes)
    return None


RULES = (
    Rule("qat_tokens", "the range of a token's activations is that of all its features", whole_tokens),
    Rule("qat_groups", "every group of weights has its own scale", whole_groups),
)
