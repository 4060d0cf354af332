"""The lab's mixture of experts against the blocks of Mixtral and DeepSeek-V3 in transformers: outputs and gradients.

DeepSeek-V3 is compared with one group of experts and a scaling factor of 1, because the lab has no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests.anchors.differences import Differs, hold
from tests.anchors.theirs import in_float64
from tests.rows.base import configured
from train.config.schema import ModelConfig
from train.model.moe import MixtureOfExperts
from train.model.transformer import FeedForward, feed_forward
from train.model.weights import materialise

SMALL = ("model=moe_tiny", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=4", "model.expert_ffn_dim=24")
SOFTMAX = ("model.score_function=softmax", "model.balance=none")


@dataclass(frozen=True)
class Case:
    """A mixture. `mixtral`: it is Mixtral's, else DeepSeek-V3's. In float64 their routers compute in float64 too."""

    name: str
    mixtral: bool
    overrides: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    bound: float = 1e-12

    @property
    def config(self) -> ModelConfig:
        return configured([*SMALL, *(SOFTMAX if self.mixtral else ()), *self.overrides]).model


def lab_mixture(config: ModelConfig, dtype: torch.dtype) -> MixtureOfExperts:
    """The lab's mixture, with biases that change the choice of experts if it has any."""
    with torch.device("meta"):
        block = feed_forward(config).to(dtype)
    materialise(block, "layers.0.feed_forward.", config, seed=5, device=torch.device("cpu"))
    assert isinstance(block, MixtureOfExperts)
    if block.router.bias is not None:
        block.router.bias.normal_(0.0, 0.05, generator=torch.Generator().manual_seed(6))
    return block


def mixtral(ours: MixtureOfExperts, config: ModelConfig) -> nn.Module:
    """Mixtral's block with the lab's weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    described = MixtralConfig(
        hidden_size=config.dim,
        intermediate_size=config.expert_ffn_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        experts_implementation="eager",
    )
    return _with_weights(MixtralSparseMoeBlock(described), ours)


def deepseek(ours: MixtureOfExperts, config: ModelConfig) -> nn.Module:
    """DeepSeek-V3's block with the lab's weights and biases."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    described = DeepseekV3Config(
        hidden_size=config.dim,
        moe_intermediate_size=config.expert_ffn_dim,
        n_routed_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        n_shared_experts=config.num_shared_experts,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
        experts_implementation="eager",
    )
    block = _with_weights(DeepseekV3MoE(described), ours)
    assert ours.router.bias is not None and isinstance(block.gate, nn.Module)
    block.gate.e_score_correction_bias = ours.router.bias.clone()
    return block


def _with_weights(block: nn.Module, ours: MixtureOfExperts) -> nn.Module:
    block = block.to(ours.router.weight.dtype)
    names = dict(block.named_parameters())
    with torch.no_grad():
        for name, value in _named(ours, "weight"):
            names.pop(name).copy_(value)
    assert not names, "parameters that the lab's mixture has no name for"
    return block


def _named(ours: MixtureOfExperts, kind: str) -> Iterator[tuple[str, Tensor]]:
    """The lab's weights, or their gradients with `kind` "gradient", under the names and in the layout of theirs: an
    expert's gate and up are one matrix there."""

    def of(p: nn.Parameter) -> Tensor:
        value = p.detach() if kind == "weight" else p.grad
        if value is None:
            raise Differs("a weight of the mixture has no gradient")
        return value

    yield "gate.weight", of(ours.router.weight)  # type: ignore[arg-type]
    yield "experts.gate_up_proj", torch.cat((of(ours.experts.gate), of(ours.experts.up)), dim=1)
    yield "experts.down_proj", of(ours.experts.down)
    if isinstance(ours.shared, FeedForward):
        for name in ("gate", "up", "down"):
            yield f"shared_experts.{name}_proj.weight", of(getattr(ours.shared, name).weight)


def check_mixture(case: Case) -> dict[str, float]:
    """The largest errors of outputs and gradients, also that of the input. Raises Differs if one is above the bound."""
    config = case.config
    ours = lab_mixture(config, case.dtype)
    generator = torch.Generator().manual_seed(7)
    x, weights = (torch.randn(4, 16, config.dim, generator=generator).to(case.dtype) for _ in range(2))
    with _precision(case):
        theirs = (mixtral if case.mixtral else deepseek)(ours, config)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected = theirs(inputs[1])
        (expected * weights).sum().backward()
    out = ours(inputs[0])
    (out * weights).sum().backward()
    assert (ours.router.num_chosen > 0).all(), "an expert was never chosen, so that its gradient says nothing"
    assert inputs[0].grad is not None and inputs[1].grad is not None
    errors = {"output": hold("the output", out, expected, case.bound)}
    errors["gradients"] = hold("the gradient of the input", inputs[0].grad, inputs[1].grad, case.bound)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, grad in _named(ours, "gradient"):
        found = grads[name]
        assert found is not None
        errors["gradients"] = max(errors["gradients"], hold(f"the gradient of {name}", grad, found, case.bound))
    return errors


def _precision(case: Case) -> AbstractContextManager[None]:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    from transformers.models.mixtral import modeling_mixtral

    float64 = case.dtype is torch.float64
    return in_float64(modeling_mixtral, modeling_deepseek_v3) if float64 else nullcontext()
