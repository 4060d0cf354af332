"""Bugs of the validation loss, which training does not show."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.planted.base import Counter
from train import step
from train.config.fields import IGNORE_INDEX
from train.config.strategy import BATCH_AXES
from train.strategies.pipeline import stages


@contextmanager
def judged_on_the_first_labels(counter: Counter) -> Iterator[None]:
    """A pipeline compares the output of every microbatch of an evaluation with the first microbatch's targets."""
    original = stages.run_forwards

    def run_forwards(own: Any, inputs: Any, hidden: Tensor, group: Any, finish: Any) -> list[Tensor]:
        counter.calls += 1
        return original(own, inputs, hidden, group, lambda i, out: finish(0, out))

    with mock.patch.object(stages, "run_forwards", run_forwards):
        yield


@contextmanager
def own_tokens_times_ranks(counter: Counter) -> Iterator[None]:
    """An evaluation counts the valid targets of its own rank, times the number of data ranks."""

    def count_valid(targets: Tensor, mesh: DeviceMesh) -> Tensor:
        counter.calls += 1
        ranks = 1
        for axis in BATCH_AXES:
            ranks *= mesh[axis].size()
        return (targets != IGNORE_INDEX).sum() * ranks

    with mock.patch.object(step, "count_valid", count_valid):
        yield


BUGS = (judged_on_the_first_labels, own_tokens_times_ranks)
