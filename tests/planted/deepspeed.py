"""Bugs where the lab uses sums and DeepSpeed uses means."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from tests.planted.base import Counter


@contextmanager
def averaged_over_ranks(counter: Counter) -> Iterator[None]:
    """DeepSpeed's mean over the data ranks is not turned into a sum: gradients are too small by the number of ranks."""
    from train.strategies.deepspeed import engine as deepspeed_engine
    from train.strategies.deepspeed import pipe as deepspeed_pipe

    def summed(loss: Tensor, data_ranks: int) -> Tensor:
        counter.calls += 1
        return loss

    with mock.patch.object(deepspeed_engine, "summed", summed), mock.patch.object(deepspeed_pipe, "summed", summed):
        yield


@contextmanager
def tensor_ranks_averaged(counter: Counter) -> Iterator[None]:
    """Gradients are multiplied by all ranks, but DeepSpeed's mean is over data ranks: they are tp times too large."""
    from train.strategies.deepspeed import engine as deepspeed_engine

    def summed(loss: Tensor, data_ranks: int) -> Tensor:
        counter.calls += 1
        return loss * dist.get_world_size()

    with mock.patch.object(deepspeed_engine, "summed", summed):
        yield


BUGS = (averaged_over_ranks, tensor_ranks_averaged)
