"""The keys under `model`: the transformer's shape, and its mixture of experts if it has one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from train.config.fields import (
    LARGE,
    MAX_COLUMNS,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_TOKENS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    key,
    number,
)


class AttentionKernel(Enum):
    sdpa = "sdpa"
    eager = "eager"


class ScoreFunction(Enum):
    softmax = "softmax"
    sigmoid = "sigmoid"


class Balance(Enum):
    """What keeps the experts' loads even."""

    none = "none"
    aux_loss = "aux_loss"
    bias = "bias"


@dataclass
class ModelConfig:
    name: str = key(MISSING, "The model's name, which messages and run directories show.")
    num_layers: int = number(MISSING, "The number of transformer layers.", ge=1, le=MAX_LAYERS, example=8)
    dim: int = number(
        MISSING, "The width of the residual stream, in features per token.", ge=2, le=MAX_WIDTH, example=128
    )
    num_heads: int = number(MISSING, "The number of query heads of each layer.", ge=1, le=MAX_WIDTH, example=8)
    num_kv_heads: int = number(
        MISSING,
        "The number of key and value heads of each layer; fewer than num_heads is grouped-query attention.",
        ge=1,
        le=MAX_WIDTH,
        example=4,
    )
    ffn_dim: int = number(
        MISSING, "The hidden width of each dense feed-forward, in features.", ge=1, le=MAX_COLUMNS, example=352
    )
    vocab_size: int = number(
        MISSING, "The number of token ids that the model knows.", ge=2, le=MAX_VOCABULARY, example=256
    )
    max_seq_len: int = number(
        MISSING, "The longest sequence that the model takes, in tokens.", ge=1, le=MAX_TOKENS, example=128
    )
    rope_theta: float = number(10000.0, "The base of the rotary position embedding's wavelengths.", gt=0, le=LARGE)
    norm_eps: float = number(
        1e-5, "This is added to the mean square in RMSNorm, so that it never divides by zero.", gt=0, le=LARGE
    )
    init_scale: float = number(
        0.5,
        "Initial weights have the standard deviation init_scale / sqrt(columns); GPT-2 small's 0.02 is about 0.55.",
        gt=0,
        le=1e6,
    )
    dropout: float = number(0.0, "The probability with which dropout sets an activation to zero.", ge=0, lt=1)
    tie_embeddings: bool = key(False, "The output head shares its weight with the token embedding.")
    attention: AttentionKernel = key(
        AttentionKernel.sdpa,
        "How attention is computed: sdpa is PyTorch's fused kernel; eager computes the formula step by step, which is "
        "slow but works with any dtype.",
    )
    num_experts: int = number(
        0,
        "The number of experts of each layer's mixture; with 0 every feed-forward is dense.",
        ge=0,
        le=MAX_EXPERTS,
    )
    top_k: int = number(
        2, "The number of experts that each token is sent to, in a mixture of experts.", ge=1, le=MAX_EXPERTS
    )
    num_shared_experts: int = number(
        0, "The number of additional experts that every token is sent to.", ge=0, le=MAX_EXPERTS
    )
    expert_ffn_dim: int = number(0, "The hidden width of each expert, in features.", ge=0, le=MAX_COLUMNS)
    score_function: ScoreFunction = key(
        ScoreFunction.sigmoid,
        "How a router turns its outputs into scores: softmax as in Mixtral and Switch, sigmoid as in DeepSeek-V3.",
    )
    balance: Balance = key(
        Balance.none,
        "What keeps the experts' loads even: nothing, an auxiliary loss for each sequence (aux_loss), "
        "or a bias on the choice of experts that moves once per optimiser step (bias).",
    )
    aux_loss_coef: float = number(0.01, "The weight of the auxiliary loss under model.balance=aux_loss.", ge=0, le=1e6)
    bias_update_rate: float = number(
        0.001, "How far the bias of an expert moves per optimiser step under model.balance=bias.", ge=0, le=1e6
    )
