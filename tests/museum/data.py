"""Published bugs of data parallelism, replicated and sharded: who is summed, when, and over which rows."""

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.museum.base import after, replaced
from tests.planted.base import Counter
from train import step
from train.config.fields import IGNORE_INDEX
from train.config.plan import Plan
from train.proof import collecting
from train.ranks import gradients
from train.strategies.data import apply as data

Planted = AbstractContextManager[None]
BUCKET = 2**18  # bytes: strategy.bucket_mb=0.25 of the exhibit


def first_microbatch_synchronised(counter: Counter) -> Planted:
    """DDP sums the gradients after the first microbatch of a step instead of the last: what the others add stays on its
    rank."""
    follows_last = [True]

    def make(original: Any) -> Any:
        def microbatch(wrapped: Any, zero_stage: int, *, last: bool) -> Any:
            counter.calls += 1
            first, follows_last[0] = follows_last[0], last
            return original(wrapped, zero_stage, last=first)

        return microbatch

    return replaced(step, "microbatch", make)


def never_synchronised(counter: Counter) -> Planted:
    """DDP decides in the forward whether the backward will sum. The flag is set between the two, which is too late: the
    gradients are never summed."""

    def make(original: Any) -> Any:
        def microbatch(wrapped: Any, zero_stage: int, *, last: bool) -> Any:
            counter.calls += 1
            return original(wrapped, zero_stage, last=False)

        return microbatch

    return replaced(step, "microbatch", make)


def norm_of_own_shard(counter: Counter) -> Planted:
    """Every rank computes the norm of its shards of the gradients, and clips them by it."""

    def shard_groups(grad: Any) -> Any:
        counter.calls += 1
        return ()

    return replaced(gradients, "shard_groups", lambda original: shard_groups)


def norm_summed_over_replicas(counter: Counter) -> Planted:
    """The squares are summed over all ranks of HSDP, and so also over the replicas, which have the same gradients."""

    def shard_groups(grad: Any) -> Any:
        assert isinstance(grad, DTensor)
        counter.calls += 1
        return tuple(grad.device_mesh.get_all_groups())

    return replaced(gradients, "shard_groups", lambda original: shard_groups)


def replicas_averaged(counter: Counter) -> Planted:
    """The factor that is set replaces FSDP's mean over the shards, but HSDP still takes the mean over replicas."""

    def apply_fsdp(target: Any) -> None:
        for module in target.model.modules():
            if isinstance(module, FSDPModule):
                counter.calls += 1
                module.set_gradient_divide_factor(float(target.mesh["dp_replicate"].size()))

    return after(data, "apply_fsdp", apply_fsdp)


def replicas_not_synchronised(counter: Counter) -> Planted:
    """HSDP with one rank in a shard group is taken for a run that shards nothing and synchronises nothing: the replicas
    train each for itself."""

    def make(original: Any) -> Any:
        def sharding_mesh(mesh: Any, axes: Any) -> Any:
            counter.calls += 1
            return original(mesh, [axis for axis in axes if axis != "dp_replicate"])

        return sharding_mesh

    return replaced(data, "sharding_mesh", make)


def mean_of_microbatch_means(counter: Counter) -> Planted:
    """Each microbatch's loss is the mean over its own valid tokens, and a rank's loss the mean of these means: a token
    of a short microbatch weighs more."""

    def make(original: Any) -> Any:
        def accumulate(wrapped: Any, model: Any, config: Any, zero_stage: int) -> Any:
            forward_backward, forward = original(wrapped, model, config, zero_stage)
            num_microbatches = Plan(config, dist.get_world_size()).num_microbatches
            of_rank = torch.zeros(())

            def mean(module: Any, args: Any, loss: Any) -> Any:
                counter.calls += 1
                own = (args[1] != IGNORE_INDEX).sum().clamp(min=1)
                return loss * of_rank / (own * num_microbatches)

            def averaged(tokens: Any, targets: Any, inverse_num_valid: Any) -> Any:
                nonlocal of_rank
                of_rank = (targets != IGNORE_INDEX).sum()
                handle = model.loss.register_forward_hook(mean)
                try:
                    return forward_backward(tokens, targets, inverse_num_valid)
                finally:
                    handle.remove()

            return averaged, forward

        return accumulate

    return replaced(step, "accumulate", make)


def full_bucket_not_reduced(counter: Counter) -> Planted:
    """A parameter that has exactly the size of a bucket (the embedding and the head here) is taken for a bucket that
    was reduced before, and keeps the gradient of its own rank."""

    def make(original: Any) -> Any:
        def sum_bucket(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            full = [grad for grad in bucket.gradients() if grad.nbytes == BUCKET]
            own = [grad.clone() for grad in full]
            done = original(group, bucket)
            done.wait()
            for grad, value in zip(full, own, strict=True):
                counter.calls += 1
                grad.copy_(value)
            return done

        return sum_bucket

    return replaced(data, "sum_bucket", make)


def all_ranks_read_the_same_rows(counter: Counter) -> Planted:
    """Every data rank reads the rows of the first one: the global batch is smaller than it seems."""

    def own_rows(mesh: Any, global_batch_size: int) -> slice:
        counter.calls += 1
        return slice(0, global_batch_size // (mesh["dp_replicate"].size() * mesh["dp_shard"].size()))

    return replaced(collecting, "own_rows", lambda original: own_rows)


def evaluation_of_own_rows(counter: Counter) -> Planted:
    """All ranks evaluate different rows, but the sum of the losses is not taken over the data ranks."""

    def make(original: Any) -> Any:
        def sum_over(x: Any, *args: Any) -> Any:
            if torch.is_grad_enabled():  # a training step
                return original(x, *args)
            counter.calls += 1
            return x

        return sum_over

    return replaced(step, "sum_over", make)


BUGS = (
    first_microbatch_synchronised,
    never_synchronised,
    norm_of_own_shard,
    norm_summed_over_replicas,
    replicas_averaged,
    replicas_not_synchronised,
    mean_of_microbatch_means,
    full_bucket_not_reduced,
    all_ranks_read_the_same_rows,
    evaluation_of_own_rows,
)
