"""The lab's model against transformers' LlamaForCausalLM: logits, loss and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tests.anchors.differences import Differs, hold
from tests.anchors.theirs import Llama
from tests.rows.base import configured
from train.config.fields import IGNORE_INDEX
from train.config.schema import ModelConfig, Precision
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise

SMALL = ("model.num_layers=2", "model.dim=32", "model.num_heads=4", "model.num_kv_heads=4", "model.ffn_dim=48")


@dataclass(frozen=True)
class Case:
    """A model and a batch. `overrides` of `model=tiny` with SMALL; `attention` of transformers' model; `raised`:
    whether its float32 parts compute in float64."""

    name: str
    overrides: tuple[str, ...] = ()
    seq_len: int = 24
    rows: int = 3
    precision: Precision = Precision.float64
    attention: str = "sdpa"
    raised: bool = True
    bound: float = 1e-12

    @property
    def config(self) -> ModelConfig:
        return configured(["model=tiny", *SMALL, f"train.seq_len={self.seq_len}", *self.overrides]).model


def lab_model(config: ModelConfig, precision: Precision) -> Transformer:
    """The lab's model. Every weight is changed by a random factor, because all norms start as ones, and a mistake that
    exchanges two of them would not be seen."""
    model = Transformer(config, **dtypes(precision))
    materialise(model, "", config, seed=5, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
    return model


def batch(config: ModelConfig, rows: int) -> tuple[Tensor, Tensor, int]:
    """Random tokens and targets BT, of which every fifth has no loss, and the number of the others."""
    generator = torch.Generator().manual_seed(7)
    shape = (rows, config.max_seq_len)
    tokens, targets = (torch.randint(0, config.vocab_size, shape, generator=generator) for _ in range(2))
    targets[torch.rand(shape, generator=generator) < 0.2] = IGNORE_INDEX
    return tokens, targets, int((targets >= 0).sum())


def check_model(case: Case) -> dict[str, float]:
    """The largest errors of logits, loss and gradients. Raises Differs if one is above the case's bound."""
    config = case.config
    tokens, targets, num_valid = batch(config, case.rows)
    ours = lab_model(config, case.precision)
    weights = {name: p.detach() for name, p in ours.named_parameters()}
    theirs = Llama(config, weights, attention=case.attention, raised=case.raised)
    logits = ours(tokens)
    loss = ours.loss(logits, targets) / num_valid
    loss.backward()
    their_logits, their_loss = theirs(tokens, targets, num_valid)
    their_loss.backward()
    errors = {
        "logits": hold("logits", logits, their_logits, case.bound),
        "loss": hold("loss", loss, their_loss, case.bound),
        "gradients": 0.0,
    }
    expected = theirs.parameters()
    for name, p in ours.named_parameters():
        grad = expected[name].grad
        if p.grad is None or grad is None:
            raise Differs(f"{name}: it has no gradient")
        errors["gradients"] = max(errors["gradients"], hold(f"the gradient of {name}", p.grad, grad, case.bound))
    return errors
