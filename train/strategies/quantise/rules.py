"""The rules of quantisation-aware training."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule

GROUP = 32  # neighbouring inputs of a linear layer whose weights share a scale
OFF = "train.qat=none"


def said(plan: Plan) -> str:
    return f"train.qat={plan.config.train.qat.value}"


def whole_tokens(plan: Plan) -> Finding | None:
    tp = plan.axes.get("tp")
    if tp is None:
        return None
    message = f"{said(plan)} is not supported with strategy.tp={tp}, under which no rank has all features of a token"
    return Finding(message, (f"strategy.tp=null strategy.dp_shard={tp}", "strategy.tp=null", OFF), "use fsdp")


def whole_groups(plan: Plan) -> Finding | None:
    model = plan.config.model
    widths = {"model.dim": model.dim}
    if not model.num_experts:
        widths["model.ffn_dim"] = model.ffn_dim
    elif model.num_shared_experts:
        widths["model.num_shared_experts x model.expert_ffn_dim"] = model.num_shared_experts * model.expert_ffn_dim
    for name, width in widths.items():
        if width % GROUP:
            whole = max(round(width / GROUP), 1) * GROUP
            fixes = (f"{name}={whole}", OFF) if " " not in name else (OFF,)
            return Finding(f"{said(plan)} rounds groups of {GROUP} weights, which do not divide {name}={width}", fixes)
    return None


RULES = (
    Rule("qat_tokens", "the range of a token's activations is that of all its features", whole_tokens),
    Rule("qat_groups", "every group of weights has its own scale", whole_groups),
)
