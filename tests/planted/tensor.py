"""Bugs of tensor parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.planted.base import Counter
from train.ranks import gradients
from train.strategies import apply
from train.strategies.tensor import layers as tensor


@contextmanager
def norm_gradient_not_summed(counter: Counter) -> Iterator[None]:
    """Under sequence parallelism a norm sees only a shard of the tokens, but its gradient is not summed over ranks."""

    def forward(self: Any, x: Any) -> Any:
        counter.calls += 1
        return self.normalise(x, self.weight.to_local())

    with mock.patch.object(tensor.SequenceParallelRMSNorm, "forward", forward):
        yield


@contextmanager
def norm_counts_replicas(counter: Counter) -> Iterator[None]:
    """The global norm sums the squares of all gradients over the tp ranks, also of those that all ranks have."""

    def shard_groups(grad: Any) -> tuple[Any, ...]:
        counter.calls += 1
        return tuple(grad.device_mesh.get_all_groups())

    with mock.patch.object(gradients, "shard_groups", shard_groups):
        yield


@contextmanager
def masks_differ_where_tokens_are_replicated(counter: Counter) -> Iterator[None]:
    """Every rank draws its own dropout masks, also tp ranks with the same activations."""
    original = apply.seed_dropout

    def seed_dropout(mesh: Any, *args: Any) -> None:
        counter.calls += 1
        original(mesh, *args)
        torch.manual_seed(torch.initial_seed() + mesh["tp"].get_local_rank())

    with mock.patch.object(apply, "seed_dropout", seed_dropout):
        yield


@contextmanager
def maximum_of_own_shard(counter: Counter) -> Iterator[None]:
    """The vocabulary-parallel loss subtracts a different maximum in each shard before it sums the exponentials."""

    def max_of(x: Any, group: Any) -> Any:
        counter.calls += 1
        return x

    with mock.patch.object(tensor.collectives, "max_of", max_of):
        yield


@contextmanager
def shared_head_gradient_not_summed(counter: Counter) -> Iterator[None]:
    """Ranks that share a KV head use it for different query heads, but their gradients are not summed."""

    def forward(self: Any, x: Any) -> Any:
        counter.calls += 1
        return torch.nn.functional.linear(x, self.weight.to_local())

    with mock.patch.object(tensor.SharedHeadLinear, "forward", forward):
        yield


BUGS = (
    norm_gradient_not_summed,
    norm_counts_replicas,
    masks_differ_where_tokens_are_replicated,
    maximum_of_own_shard,
    shared_head_gradient_not_summed,
)
