"""Lossy gradient sums for DDP: what is sent is smaller, what arrives is not quite the sum.

fp16, bf16: the bucket is rounded to 16 bits, summed, and widened: half the bytes of float32. PowerSGD (Vogels et al.
2019): the n x m gradient of a matrix is sent as two factors of rank r, (n + m) r numbers instead of n m, and what
that leaves out is added to the next step's gradient (error feedback). Vectors are sent whole.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as powersgd

if TYPE_CHECKING:
    from train.strategies.spmd import Spmd

Future = torch.futures.Future[torch.Tensor]


# Annotations here are real types, not strings (no `from __future__`): DDP checks them.
def rounded_sum(group: dist.ProcessGroup, bucket: dist.GradBucket, dtype: torch.dtype) -> Future:
    """The bucket's sum over the group, by way of `dtype`."""
    work = dist.all_reduce(bucket.buffer().to(dtype), group=group, async_op=True)
    return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))


def fp16_sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    return rounded_sum(group, bucket, torch.float16)


def bf16_sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    return rounded_sum(group, bucket, torch.bfloat16)


def powersgd_sum(state: powersgd.PowerSGDState, bucket: dist.GradBucket) -> Future:
    """Torch's hook gives a mean over the group; here gradients are sums."""
    size = state.process_group.size()
    return powersgd.powerSGD_hook(state, bucket).then(lambda future: future.value().mul_(size))


def compression(strategy: "Spmd", group: dist.ProcessGroup) -> tuple[Any, Callable[..., Future]] | None:
    """(state, hook) of `strategy.comm_hook` for `register_comm_hook`; None sends gradients as they are."""
    if strategy.comm_hook == "powersgd":
        state = powersgd.PowerSGDState(
            group,
            matrix_approximation_rank=strategy.powersgd_rank,
            start_powerSGD_iter=strategy.powersgd_start_step,
            min_compression_rate=1,
        )
        return state, powersgd_sum
    hooks = {"none": None, "fp16": fp16_sum, "bf16": bf16_sum}
    hook = hooks[strategy.comm_hook]
    return None if hook is None else (group, hook)
