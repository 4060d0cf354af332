"""What rules ask about the linear layers of a model, for techniques that compute them with fewer bits."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding
from train.config.schema import ModelConfig


def input_widths(model: ModelConfig) -> dict[str, int]:
    """The widths of the inputs of linear layers, by the key that sets each. The experts of a mixture are none."""
    widths = {"model.dim": model.dim}
    if not model.num_experts:
        widths["model.ffn_dim"] = model.ffn_dim
    elif model.num_shared_experts:
        widths["model.num_shared_experts x model.expert_ffn_dim"] = model.num_shared_experts * model.expert_ffn_dim
    return widths


def split_by_tp(plan: Plan, setting: str, why: str, off: str) -> Finding | None:
    """The finding if ranks of `tp` have parts of the layers. `setting`: the words that need whole ones. `why`: the end
    of the message. `off`: the words without the technique."""
    tp = plan.axes.get("tp")
    if tp is None:
        return None
    message = f"{setting} is not supported with strategy.tp={tp}{why}"
    return Finding(message, (f"strategy.tp=null strategy.dp_shard={tp}", "strategy.tp=null", off), "use fsdp")
