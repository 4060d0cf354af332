"""Bugs of accumulation and of data parallelism."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.planted.base import Counter
from train import step
from train.strategies import data


@contextmanager
def accumulation_scale(counter: Counter) -> Iterator[None]:
    """Every microbatch's loss is divided by its own share of the tokens: gradients m times too large."""
    original = step.Step.count_valid

    def count_valid(self: Any, targets: Any) -> Any:
        counter.calls += 1
        return original(self, targets) // len(targets)

    with mock.patch.object(step.Step, "count_valid", count_valid):
        yield


@contextmanager
def rank_left_out(counter: Counter) -> Iterator[None]:
    """The last data-parallel rank's gradients never reach the sum."""
    original = data.sum_bucket

    def sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counter.calls += 1
        if group.rank() == group.size() - 1:
            bucket.buffer().zero_()
        return original(group, bucket)

    with mock.patch.object(data, "sum_bucket", sum_bucket):
        yield


BUGS = (accumulation_scale, rank_left_out)
