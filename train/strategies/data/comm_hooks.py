"""Lossy gradient sums for DDP: what is sent is smaller, what arrives is not quite the sum.

fp16, bf16: the bucket is rounded to 16 bits, summed, and widened: half the bytes of float32. PowerSGD: powersgd.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.strategies.data.keys import DdpKeys
from train.strategies.data.powersgd import PowerSgd

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


def powersgd_sum(state: PowerSgd, bucket: dist.GradBucket) -> Future:
    """Three all-reduces that depend on one another, and so are waited for: nothing overlaps them."""
    total = state.sum(bucket)
    future = Future(devices=[total.device] if total.device.type != "cpu" else [])
    future.set_result(total)
    return future


def compression(strategy: DdpKeys, group: dist.ProcessGroup) -> tuple[Any, Callable[..., Future]] | None:
    """(state, hook) of `strategy.comm_hook` for `register_comm_hook`; None sends gradients as they are."""
    if strategy.comm_hook == "powersgd":
        state = PowerSgd(group, rank=strategy.powersgd_rank, start_step=strategy.powersgd_start_step)
        return state, powersgd_sum
    hooks = {"none": None, "fp16": fp16_sum, "bf16": bf16_sum}
    hook = hooks[strategy.comm_hook]
    return None if hook is None else (group, hook)
