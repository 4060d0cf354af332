"""Bugs of a loss in chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from tests.planted.base import Counter
from train.config.fields import IGNORE_INDEX
from train.strategies.chunked_loss import apply


@contextmanager
def mean_of_chunks(counter: Counter) -> Iterator[None]:
    """The chunks' losses are means over their own valid tokens, of which they have different numbers."""
    original = apply.loss_and_gradient

    def loss_and_gradient(loss: Any, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        counter.calls += 1
        own, tokens = (targets != IGNORE_INDEX).sum().clamp(min=1), targets.numel()
        total, grad = original(loss, x, weight, targets)
        return total * tokens / own, grad * tokens / own

    with mock.patch.object(apply, "loss_and_gradient", loss_and_gradient):
        yield


@contextmanager
def incoming_gradient_ignored(counter: Counter) -> Iterator[None]:
    """The backward gives back what the forward has computed, as if the loss was not divided after that."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        counter.calls += 1
        return *ctx.saved_tensors, None, None, None

    with mock.patch.object(apply._LossInChunks, "backward", staticmethod(backward)):
        yield


BUGS = (mean_of_chunks, incoming_gradient_ignored)
