"""Bugs in code that `single` shares with every strategy, so that the comparison with one device cannot see them. The
anchors in tests/anchors/ must: they hold `single` against what others wrote."""

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.planted.base import Counter
from train import step
from train.config.schema import OptimConfig
from train.data.corpus import Corpus
from train.model import transformer
from train.ranks import distributed, gradients, optim


@contextmanager
def rate_a_step_late(counter: Counter) -> Iterator[None]:
    """Each step trains at the learning rate of the step before it, and the first one at 0."""
    original = optim.lr_at

    def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
        counter.calls += 1
        return original(step - 1, num_steps, config)

    with mock.patch.object(optim, "lr_at", lr_at):
        yield


@contextmanager
def norms_decay(counter: Counter) -> Iterator[None]:
    """The weights of norms decay as matrices do."""

    def decays(parameter: nn.Parameter) -> bool:
        counter.calls += 1
        return True

    with mock.patch.object(optim, "decays", decays):
        yield


def _other_optimiser(counter: Counter, **changes: str | float) -> AbstractContextManager[Any]:
    """The optimiser is built with these changes of its config; a text names the key whose value is taken."""
    original = optim.build_optimiser

    def build_optimiser(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
        counter.calls += 1
        values: dict[str, Any] = {
            key: getattr(config, value) if isinstance(value, str) else value for key, value in changes.items()
        }
        return original(parameters, dataclasses.replace(config, **values))

    return mock.patch.object(optim, "build_optimiser", build_optimiser)


@contextmanager
def betas_swapped(counter: Counter) -> Iterator[None]:
    """AdamW gets its two decay rates in the other order."""
    with _other_optimiser(counter, beta1="beta2", beta2="beta1"):
        yield


@contextmanager
def adam_eps_of_torch(counter: Counter) -> Iterator[None]:
    """AdamW does not get the config's eps, so torch's default is used."""
    with _other_optimiser(counter, eps=1e-8):
        yield


@contextmanager
def clip_without_clamp(counter: Counter) -> Iterator[None]:
    """Gradients are scaled to the largest norm also if they are below it."""

    def clip(grads: Any, norm: Tensor, max_norm: float) -> None:
        counter.calls += 1
        torch._foreach_mul_([gradients.local(grad) for grad in grads], max_norm / (norm + 1e-6))

    with mock.patch.object(gradients, "clip", clip):
        yield


@contextmanager
def norm_after_clipping(counter: Counter) -> Iterator[None]:
    """The gradient norm that is reported is the one after clipping."""
    original = gradients.clip

    def clip(grads: Any, norm: Tensor, max_norm: float) -> None:
        counter.calls += 1
        original(grads, norm, max_norm)
        norm.clamp_(max=max_norm)

    with mock.patch.object(gradients, "clip", clip):
        yield


@contextmanager
def mask_not_counted(counter: Counter) -> Iterator[None]:
    """The loss is divided by the number of all targets, also of those that have no loss."""
    original = distributed.count_valid

    def count_valid(targets: Tensor, mesh: Any) -> Tensor:
        counter.calls += 1
        return original(torch.zeros_like(targets), mesh)

    with (
        mock.patch.object(distributed, "count_valid", count_valid),
        mock.patch.object(step, "count_valid", count_valid),
    ):
        yield


@contextmanager
def same_batch_at_every_step(counter: Counter) -> Iterator[None]:
    """The position of the batch does not depend on the step."""
    original = Corpus._starts

    def starts(self: Corpus, step: int, size: int) -> Any:
        counter.calls += 1
        return original(self, 1, size)

    with mock.patch.object(Corpus, "_starts", starts):
        yield


@contextmanager
def first_validation_batch_only(counter: Counter) -> Iterator[None]:
    """The validation loss is that of the first validation batch."""
    original = Corpus.validation_batch

    def validation_batch(self: Corpus, index: int, count: int, size: int, rows: slice) -> Any:
        counter.calls += 1
        return original(self, 0, count, size, rows)

    with mock.patch.object(Corpus, "validation_batch", validation_batch):
        yield


@contextmanager
def rate_of_the_first_group(counter: Counter) -> Iterator[None]:
    """The learning rate of the step reaches only the optimiser's first group: norms keep the highest rate."""

    def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
        counter.calls += 1
        optimiser.param_groups[0]["lr"] = lr

    with mock.patch.object(optim, "set_lr", set_lr):
        yield


@contextmanager
def norms_of_a_block_mixed_up(counter: Counter) -> Iterator[None]:
    """Attention gets the input of the feed-forward's norm, and the feed-forward that of attention's."""

    def forward(self: transformer.Block, x: Tensor, rope: Tensor) -> Tensor:
        counter.calls += 1
        x = x + self.dropout(self.attention(self.feed_forward_norm(x), rope))
        return x + self.dropout(self.feed_forward(self.attention_norm(x)))

    with mock.patch.object(transformer.Block, "forward", forward):
        yield


@contextmanager
def norm_eps_of_torch(counter: Counter) -> Iterator[None]:
    """RMSNorm does not get the config's eps, so torch's default is used, which depends on the dtype."""

    def normalise(self: transformer.RMSNorm, x: Tensor, weight: Tensor) -> Tensor:
        counter.calls += 1
        return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype))

    with mock.patch.object(transformer.RMSNorm, "normalise", normalise):
        yield


@contextmanager
def rope_frequencies_of_half_the_range(counter: Counter) -> Iterator[None]:
    """The exponent of the frequencies counts pairs where it must count features: theta^(-i/E) and not theta^(-2i/E)."""
    original = transformer.rope_table

    def rope_table(seq_len: int, head_dim: int, theta: float) -> Tensor:
        counter.calls += 1
        return original(seq_len, 2 * head_dim, theta)[..., : head_dim // 2]

    with mock.patch.object(transformer, "rope_table", rope_table):
        yield


@contextmanager
def gelu_for_silu(counter: Counter) -> Iterator[None]:
    """The feed-forward's gate has another activation."""

    def forward(self: transformer.FeedForward, x: Tensor) -> Tensor:
        counter.calls += 1
        return self.down(F.gelu(self.gate(x)) * self.up(x))

    with mock.patch.object(transformer.FeedForward, "forward", forward):
        yield


BUGS = (
    rate_a_step_late,
    norms_decay,
    betas_swapped,
    adam_eps_of_torch,
    clip_without_clamp,
    norm_after_clipping,
    mask_not_counted,
    same_batch_at_every_step,
    first_validation_batch_only,
    rate_of_the_first_group,
    norms_of_a_block_mixed_up,
    norm_eps_of_torch,
    rope_frequencies_of_half_the_range,
    gelu_for_silu,
)
