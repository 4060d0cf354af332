"""Bugs that people really make, patched into the product's own functions where they make them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from train import step
from train.strategies import data, tensor


@dataclass
class Counter:
    """How often the patched line ran: a bug that never ran proves nothing."""

    calls: int = 0


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
def norm_gradient_not_summed(counter: Counter) -> Iterator[None]:
    """Under sequence parallelism a norm sees a shard of the tokens, but its gradient is taken for whole."""

    def forward(self: Any, x: Any) -> Any:
        counter.calls += 1
        return self.normalise(x, self.weight.to_local())

    with mock.patch.object(tensor.SequenceParallelRMSNorm, "forward", forward):
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


BUGS: dict[str, Callable[[Counter], AbstractContextManager[None]]] = {
    bug.__name__: bug for bug in (accumulation_scale, norm_gradient_not_summed, rank_left_out)
}
