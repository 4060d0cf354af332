"""The models and schedules of transformers, which is imported when a check first needs it: that takes seconds.

transformers computes norms, rotations, routers and the loss in float32, whatever the dtype of the model. `in_float64`
lets the same code compute in float64, so that it can be compared to the last digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.checkpoint.whole.llama import llama_name
from train.config.schema import LrSchedule, ModelConfig, OptimConfig


class _Float64Torch:
    """torch, with other meanings of the names of float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(*modules: ModuleType) -> Iterator[None]:
    """Inside, what these modules compute in float32 they compute in float64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        patches = [mock.patch.object(module, "torch", _Float64Torch()) for module in modules]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


class Llama:
    """LlamaForCausalLM with the lab's weights. `raised`: its float32 parts compute in float64."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor], *, attention: str, raised: bool) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM
        from transformers.models.llama import modeling_llama

        self.names = {name: llama_name(name) for name in weights}
        self.modeling, self.raised = modeling_llama, raised
        described = LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.ffn_dim,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation=attention,
            use_cache=False,
        )
        with self._precision():
            self.model = LlamaForCausalLM(described).to(weights["embed.weight"].dtype)
        parameters = dict(self.model.named_parameters())
        assert parameters.keys() == set(self.names.values()), "other parameters than the lab's"
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[self.names[name]].copy_(weight)

    def __call__(self, tokens: Tensor, targets: Tensor, num_valid: int) -> tuple[Tensor, Tensor]:
        """The logits BTV, and the sum of token losses (targets BT, -100 has none) divided by `num_valid`."""
        with self._precision():
            out = self.model(input_ids=tokens, labels=targets, shift_labels=targets, num_items_in_batch=num_valid)
        return out.logits, out.loss

    def parameters(self) -> dict[str, nn.Parameter]:
        """By the lab's names."""
        found = dict(self.model.named_parameters())
        return {ours: found[theirs] for ours, theirs in self.names.items()}

    def _precision(self) -> Any:
        return in_float64(self.modeling) if self.raised else nullcontext()


def schedule(optimiser: torch.optim.Optimizer, config: OptimConfig, num_steps: int) -> Any:
    """transformers' schedule of this kind. It begins with a rate of 0, so that the lab's step s is its step s too, if
    steps count from 1 there and from 0 here."""
    import transformers as t

    options: dict[str, Any] = {"num_warmup_steps": config.warmup_steps}
    if config.schedule is LrSchedule.constant:
        return t.get_constant_schedule_with_warmup(optimiser, **options)
    options["num_training_steps"] = num_steps
    linear, to_zero = config.schedule is LrSchedule.linear, config.min_lr_ratio == 0
    if to_zero:
        make = t.get_linear_schedule_with_warmup if linear else t.get_cosine_schedule_with_warmup
        return make(optimiser, **options)
    if linear:
        options |= {"power": 1.0, "lr_end": config.lr * config.min_lr_ratio}
        return t.get_polynomial_decay_schedule_with_warmup(optimiser, **options)
    return t.get_cosine_with_min_lr_schedule_with_warmup(optimiser, **options, min_lr_rate=config.min_lr_ratio)
