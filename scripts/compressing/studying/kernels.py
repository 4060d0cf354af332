"""What 2:4 kernels gain: the same pruned model in bf16, with dense and with sparse products of its matrices.

Only CUDA has such kernels (compute capability 8.0 and later). They are in bf16, as float32 has none.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scripts.compressing.methods.prune import prunable
from train.config.schema import Config
from train.measure.hardware import Clock
from train.model.transformer import Transformer

ROUNDS, PASSES = 7, 10  # the median of rounds counts; a round is so many forward passes
SEQUENCES = 8


@dataclass(frozen=True)
class Kernels:
    """Tokens/s of forward passes. `apart`: the largest difference of the logits, against the largest logit."""

    dense_tokens_per_s: float
    sparse_tokens_per_s: float
    apart: float

    def __str__(self) -> str:
        ratio = self.sparse_tokens_per_s / self.dense_tokens_per_s
        return f"bf16 forward, {self.dense_tokens_per_s:,.0f} tokens/s dense, {ratio:.2f} x with 2:4 kernels"


@torch.no_grad()
def speeds(model: Transformer, config: Config) -> Kernels:
    """Of a model that is pruned 2:4, on a GPU. The model is changed."""
    model.to(torch.bfloat16)
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(config.model.vocab_size, (SEQUENCES, config.train.seq_len), device=model.rope.device)
    layers = prunable(model)
    dense = {name: layer.weight for name, layer in layers.items()}
    sparse = {name: _sparse(weight) for name, weight in dense.items()}
    times: dict[str, list[float]] = {"dense": [], "sparse": []}
    logits = {}
    for _ in range(1 + ROUNDS):
        for name, weights in (("dense", dense), ("sparse", sparse)):
            for key, layer in layers.items():
                layer.weight = weights[key]
            logits[name] = model(tokens)
            times[name].append(_seconds(model, tokens))
    dense_s, sparse_s = (statistics.median(times[name][1:]) for name in ("dense", "sparse"))
    apart = (logits["dense"] - logits["sparse"]).abs().max() / logits["dense"].abs().max()
    return Kernels(tokens.numel() / dense_s, tokens.numel() / sparse_s, float(apart))


def _sparse(weight: Tensor) -> nn.Parameter:
    from torch.sparse import to_sparse_semi_structured

    return nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)


def _seconds(model: Transformer, tokens: Tensor) -> float:
    """The time of one forward pass, as a mean of PASSES."""
    clock = Clock(tokens.device)
    start = clock.mark()
    for _ in range(PASSES):
        model(tokens)
    return clock.elapsed_ms(start, clock.mark()) / 1e3 / PASSES
