"""A Llama-style decoder that knows nothing about ranks, meshes or strategies.

Shapes: B batch, T sequence, D width, H query heads, K key-value heads, E head width, V vocabulary.
Strategies rely on these properties:
- `layers` has string keys, so a parameter keeps its global name when a pipeline stage holds only some layers;
  `embed`, `norm` and `head` may be None, and `forward` skips what is None.
- Head counts follow from the projections' output (`view(B, T, -1, E)`), so splitting heads changes no attribute.
- The attention kernel (`attention.kernel`) and the loss (`loss`) are submodules that can be replaced; a layer's
  `feed_forward` is dense or a mixture of experts (`moe.py`).
- Weights are cast to the activations' dtype where they are used, so that bf16 means the same under every strategy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from train.config.fields import IGNORE_INDEX
from train.config.schema import AttentionKernel, ModelConfig, Precision
from train.model.moe import MixtureOfExperts
from train.model.numerics import upcast
from train.model.spans import span


def dtypes(precision: Precision) -> dict[str, torch.dtype]:
    """The dtype in which weights are stored, and the dtype of the computation."""
    param = torch.float64 if precision is Precision.float64 else torch.float32
    return {"param_dtype": param, "compute_dtype": torch.bfloat16 if precision.casts else param}


class Linear(nn.Linear):
    """y = x W^T, where W is cast to x's dtype."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(*self.factors(x))

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x and W as they are multiplied."""
        return x, self.weight.to(x.dtype)


class Embedding(nn.Embedding):
    """Token ids BT -> vectors BTD in the weight's own dtype, in which the gradients of equal tokens are summed."""


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 or float64 (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.weight)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), self.eps)


def rope_table(seq_len: int, head_dim: int, theta: float) -> Tensor:
    """The cosine and sine, [2, T, E/2] in float64, of each position's rotation at each frequency (Su et al. 2021)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequency)
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x_BTHE: Tensor, rope: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + E/2]) by their position's angles; `rope` is [2, T, E/2]."""
    cos, sin = rope.unsqueeze(2).unbind()
    first, second = upcast(x_BTHE).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHE.dtype)


class SdpaKernel(nn.Module):
    """Causal attention by torch's fused kernel. q: BHTE; k, v: BKTE, where K divides H."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class EagerKernel(nn.Module):
    """The same attention written out: softmax(Q K^T / sqrt(E)) V with a causal mask."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = upcast(q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Grouped-query causal self-attention (Ainslie et al. 2023) with rotary position embeddings."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.wq = Linear(config.dim, config.num_heads * self.head_dim)
        self.wk = Linear(config.dim, config.num_kv_heads * self.head_dim)
        self.wv = Linear(config.dim, config.num_kv_heads * self.head_dim)
        self.wo = Linear(config.num_heads * self.head_dim, config.dim)
        self.kernel = SdpaKernel() if config.attention is AttentionKernel.sdpa else EagerKernel()

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        q, k, v = (w(x_BTD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        rope = rope[:, : q.shape[1]]
        q, k = rotate(q, rope), rotate(k, rope)
        out = self.kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate = Linear(dim, ffn_dim)
        self.up = Linear(dim, ffn_dim)
        self.down = Linear(ffn_dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


def feed_forward(config: ModelConfig) -> nn.Module:
    """A dense feed-forward or a mixture of experts. All shared experts are one feed-forward of their total width."""
    if config.num_experts == 0:
        return FeedForward(config.dim, config.ffn_dim)
    width = config.num_shared_experts * config.expert_ffn_dim
    return MixtureOfExperts(config, FeedForward(config.dim, width) if width else None)


class Block(nn.Module):
    """One pre-norm layer: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = feed_forward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, rope: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD), rope))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class CrossEntropy(nn.Module):
    """The sum of token losses, in float32 or float64; targets equal to IGNORE_INDEX add nothing."""

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        logits = upcast(logits_BTV.flatten(0, 1))
        return F.cross_entropy(logits, targets_BT.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


class Transformer(nn.Module):
    """`forward(tokens BT) -> logits BTV`. On a pipeline stage the input or the output are hidden states BTD instead.

    Parameters are created on the meta device; `weights.materialise` gives them memory and values.
    """

    def __init__(self, config: ModelConfig, *, param_dtype: torch.dtype, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        with torch.device("meta"):
            self.embed: nn.Module | None = Embedding(config.vocab_size, config.dim)
            self.layers = nn.ModuleDict({str(i): Block(config) for i in range(config.num_layers)})
            self.norm: nn.Module | None = RMSNorm(config.dim, config.norm_eps)
            self.head: nn.Module | None = Linear(config.dim, config.vocab_size)
        self.dropout = nn.Dropout(config.dropout)
        self.loss: nn.Module = CrossEntropy()
        self.to(param_dtype)
        self.tie()
        rope = rope_table(config.max_seq_len, config.dim // config.num_heads, config.rope_theta)
        # It is not a buffer, so that nothing broadcasts, saves or casts it.
        self.rope = rope.to(torch.promote_types(compute_dtype, torch.float32))

    def tie(self) -> None:
        """Make the head share the embedding's weight, if the config asks for it."""
        if self.config.tie_embeddings and self.embed is not None and self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, positions_T: Tensor | None = None) -> Tensor:
        """`positions_T`: the positions of this input in the sequence; None means 0, 1, 2, …"""
        rope = self.rope if positions_T is None else self.rope[:, positions_T]
        if self.embed is not None:
            x = self.dropout(self.embed(x).to(self.compute_dtype))
        for name, layer in self.layers.items():
            with span("layer", name):
                x = layer(x, rope)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.head is None else self.head(x)
