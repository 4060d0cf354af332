"""FLOPs that the model's formulas need. What a strategy recomputes or pads is not counted."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the schema imports this file indirectly, through the pipeline's keys
    from train.config.schema import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """The number of weights that multiply a token's activations: all but those of the norms and of the embedding, whose
    rows are looked up.

    In a mixture of experts only active weights count: those of the router, of `top_k` experts and of the shared
    experts.
    """
    head_dim = model.dim // model.num_heads
    attention = 2 * model.dim * head_dim * (model.num_heads + model.num_kv_heads)
    feed_forward = 3 * model.dim * model.ffn_dim
    if model.num_experts:
        active = model.top_k + model.num_shared_experts
        feed_forward = model.dim * model.num_experts + 3 * model.dim * model.expert_ffn_dim * active
    return model.num_layers * (attention + feed_forward) + model.dim * model.vocab_size


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 per matmul parameter, and 12 x layers x width x T for attention (Chowdhery et al. 2022,
    appendix B; the half that the causal mask leaves out is counted)."""
    return 6.0 * matmul_parameters(model) + 12.0 * model.num_layers * model.dim * seq_len
