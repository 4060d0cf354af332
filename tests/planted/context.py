"""Bugs of context parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.planted.base import Counter
from train.strategies.context import apply as context
from train.strategies.context import block_attention


@contextmanager
def rope_from_zero(counter: Counter) -> Iterator[None]:
    """Every rank rotates its tokens as if their positions were 0, 1, 2, …"""
    original = context.shard_input

    def shard_input(model: Any, args: Any, *, positions: Any) -> Any:
        counter.calls += 1
        x, _ = original(model, args, positions=positions)
        return x, torch.arange(len(positions), device=positions.device)

    with mock.patch.object(context, "shard_input", shard_input):
        yield


@contextmanager
def merge_without_weights(counter: Counter) -> Iterator[None]:
    """Two blocks get the same weight, independent of their log-sum-exp."""
    original = block_attention.merge

    def merge(out: Any, lse: Any, block_out: Any, block_lse: Any) -> Any:
        counter.calls += 1
        _, total = original(out, lse, block_out, block_lse)
        return torch.where(lse.isinf().unsqueeze(-1), block_out, (out + block_out) / 2), total

    with mock.patch.object(block_attention, "merge", merge):
        yield


@contextmanager
def backward_of_another_step(counter: Counter) -> Iterator[None]:
    """The backward uses the current keys and values as if they were those of the next step."""
    original = context._Ring.backward

    def backward(ctx: Any, grad: Any) -> Any:
        counter.calls += 1
        source = context.ring_source
        with mock.patch.object(context, "ring_source", lambda step, rank, size: source(step + 1, rank, size)):
            return original(ctx, grad)

    with mock.patch.object(context._Ring, "backward", staticmethod(backward)):
        yield


BUGS = (rope_from_zero, merge_without_weights, backward_of_another_step)
