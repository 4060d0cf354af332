"""Rules of mixtures of experts, whatever the strategy."""

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
    message = f"model.expert_ffn_dim={model.expert_ffn_dim} gives model.num_experts={model.num_experts} no width"
    return Finding(message, (f"model.expert_ffn_dim={model.ffn_dim}",))


def shared_of_a_mixture(plan: Plan) -> Finding | None:
    model = plan.config.model
    if model.num_experts > 0 or model.num_shared_experts == 0:
        return None
    message = f"model.num_shared_experts={model.num_shared_experts} does nothing: model.num_experts=0 is a dense model"
    return Finding(message, ("model.num_shared_experts=0",))


RULES = (
    Rule("top_k", "a token's experts are different ones", chosen_experts),
    Rule("expert_width", "an expert is a feed-forward with columns", expert_width),
    Rule("shared_experts", "shared experts stand beside routed ones", shared_of_a_mixture),
)
