"""FLOPs that the model's mathematics needs, whatever a strategy recomputes or pads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the config's schema reads this file, by way of the pipeline's
    from train.config import ModelConfig


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that multiply activations: all but the embedding's rows, which are looked up, and the norms."""
    head_dim = model.dim // model.num_heads
    attention = 2 * model.dim * head_dim * (model.num_heads + model.num_kv_heads)
    return model.num_layers * (attention + 3 * model.dim * model.ffn_dim) + model.dim * model.vocab_size


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Forward and backward: 6 per matmul parameter, and 12 x layers x width x T for attention (Chowdhery et al. 2022,
    appendix B: the causal half is not taken off)."""
    return 6.0 * matmul_parameters(model) + 12.0 * model.num_layers * model.dim * seq_len
