"""Bugs of accumulation, of data parallelism and of sharded state."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tests.planted.base import Counter
from train.config.fields import IGNORE_INDEX
from train.ranks import distributed, gradients, optim
from train.strategies.data import apply as data


@contextmanager
def accumulation_scale(counter: Counter) -> Iterator[None]:
    """The loss of each microbatch is divided by its own number of tokens: gradients are m times too large."""
    original = distributed.count_valid

    def count_valid(targets: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        counter.calls += 1
        return original(targets, mesh) // len(targets)

    with mock.patch.object(distributed, "count_valid", count_valid):
        yield


@contextmanager
def mean_of_means(counter: Counter) -> Iterator[None]:
    """Each data rank divides by its own number of valid tokens times the number of ranks, not by the global number."""

    def count_valid(targets: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
        counter.calls += 1
        data_ranks = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
        return (targets != IGNORE_INDEX).sum() * data_ranks

    with mock.patch.object(distributed, "count_valid", count_valid):
        yield


@contextmanager
def shards_do_not_decay(counter: Counter) -> Iterator[None]:
    """A shard counts as one-dimensional, as in ZeRO and in FSDP1, and so gets no weight decay."""

    def decays(parameter: nn.Parameter) -> bool:
        counter.calls += 1
        return parameter.flatten().ndim >= 2

    with mock.patch.object(optim, "decays", decays):
        yield


@contextmanager
def rank_left_out(counter: Counter) -> Iterator[None]:
    """The gradients of the last data-parallel rank are left out of the sum."""
    original = data.sum_bucket

    def sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        counter.calls += 1
        if group.rank() == group.size() - 1:
            bucket.buffer().zero_()
        return original(group, bucket)

    with mock.patch.object(data, "sum_bucket", sum_bucket):
        yield


@contextmanager
def norms_rounded_on_every_rank(counter: Counter) -> Iterator[None]:
    """Every rank clips by a norm of its own, which differs in the last bits, as if each added it up in its own order:
    its copy of the weights drifts away from the others."""
    original = gradients.clip

    def clip(grads: Sequence[torch.Tensor], norm: torch.Tensor, max_norm: float) -> None:
        counter.calls += 1
        original(grads, norm * (1 + 2 * dist.get_rank() * torch.finfo(norm.dtype).eps), max_norm)

    with mock.patch.object(gradients, "clip", clip):
        yield


BUGS = (accumulation_scale, mean_of_means, shards_do_not_decay, rank_left_out, norms_rounded_on_every_rank)
