"""Rules of mixtures of experts that hold for every strategy."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.rule import Finding, Rule


def chosen_experts(plan: Plan) -> Finding | None:
    model = plan.config.model
    if model.num_experts == 0 or model.top_k <= model.num_experts:
        return None
    message = f"model.top_k={model.top_k} is more than model.num_experts={model.num_experts}"
    return Finding(message, (f"model.top_k={model.num_experts}",))


def expert_width(plan: Plan) -> Finding | None:
    model = plan.config.model
    if model.num_experts == 0 or model.expert_ffn_dim > 0:
        return None
    message = f"model.expert_ffn_dim={model.expert_ffn_dim} must be positive with model.num_experts={model.num_experts}"
    return Finding(message, (f"model.expert_ffn_dim={model.ffn_dim}",))


RULES = (
    Rule("top_k", "each token is sent to top_k different experts", chosen_experts),
    Rule("expert_width", "an expert is a feed-forward, whose hidden width must be positive", expert_width),
)
