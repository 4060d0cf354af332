"""Bugs at the border between the lab's sums and DeepSpeed's means."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch import Tensor

from tests.planted.base import Counter


@contextmanager
def averaged_over_ranks(counter: Counter) -> Iterator[None]:
    """DeepSpeed's mean over the data ranks is left as it is: gradients too small by their number."""
    from train.strategies import deepspeed_engine, deepspeed_pipe

    def summed(loss: Tensor, data_ranks: int) -> Tensor:
        counter.calls += 1
        return loss

    with mock.patch.object(deepspeed_engine, "summed", summed), mock.patch.object(deepspeed_pipe, "summed", summed):
        yield


BUGS = (averaged_over_ranks,)
