"""Bugs of random numbers: masks that are equal, different, or drawn again where they must not be."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.planted.base import Counter
from train import step
from train.strategies import apply
from train.strategies.recompute import apply as recompute


@contextmanager
def masks_equal_on_all_ranks(counter: Counter) -> Iterator[None]:
    """Every rank seeds its masks only with the seed of the run, also ranks with other tokens or other layers."""

    def seed_dropout(mesh: Any, config: Any, apart: Any) -> None:
        counter.calls += 1
        torch.manual_seed(config.train.seed)

    with mock.patch.object(apply, "seed_dropout", seed_dropout):
        yield


@contextmanager
def masks_start_anew(counter: Counter) -> Iterator[None]:
    """The generator is seeded again for every microbatch, so that all draw the same masks."""
    original = step.microbatch

    def microbatch(*args: Any, **options: Any) -> Any:
        counter.calls += 1
        torch.manual_seed(1234 + torch.distributed.get_rank())
        return original(*args, **options)

    with mock.patch.object(step, "microbatch", microbatch):
        yield


@contextmanager
def masks_not_replayed(counter: Counter) -> Iterator[None]:
    """Recomputation in the backward draws new masks."""
    original = recompute.checkpoint

    def checkpoint(*args: Any, **options: Any) -> Any:
        counter.calls += 1
        return original(*args, preserve_rng_state=False, **options)

    with mock.patch.object(recompute, "checkpoint", checkpoint):
        yield


BUGS = (masks_equal_on_all_ranks, masks_start_anew, masks_not_replayed)
