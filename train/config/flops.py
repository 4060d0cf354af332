"""FLOPs that the model's mathematics needs, whatever a strategy recomputes or pads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config's schema reads this file, by way of the pipeline's
    from train.config.schema import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that multiply a token's activations: all but the embedding's rows, which are looked up, and the norms.

    Of a mixture of experts, those that are active: the router, `top_k` experts and the shared ones, whichever a token
    chooses.
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
    appendix B: the causal half is not taken off)."""
    return 6.0 * matmul_parameters(model) + 12.0 * model.num_layers * model.dim * seq_len
