"""Communication hooks of DDP that send fewer bytes. The result is not exactly the sum of the gradients.

fp16, bf16: the bucket is rounded to 16 bits, summed and converted back, which halves the bytes of float32.
powersgd: see powersgd.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from train.strategies.data.keys import DdpKeys
from train.strategies.data.powersgd import PowerSgd

Future = torch.futures.Future[torch.Tensor]


# Annotations in this file are real types, not strings (no `from __future__`), because DDP checks them.
def rounded_sum(group: dist.ProcessGroup, bucket: dist.GradBucket, dtype: torch.dtype) -> Future:
    """The bucket's sum over the group, rounded to `dtype` on the way."""
    work = dist.all_reduce(bucket.buffer().to(dtype), group=group, async_op=True)
    return work.get_future().then(lambda future: bucket.buffer().copy_(future.value()[0]))


def fp16_sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    return rounded_sum(group, bucket, torch.float16)


def bf16_sum(group: dist.ProcessGroup, bucket: dist.GradBucket) -> Future:
    return rounded_sum(group, bucket, torch.bfloat16)


def powersgd_sum(state: PowerSgd, bucket: dist.GradBucket) -> Future:
    """Up to three all-reduces. Each needs the result of the one before, so the hook waits, and nothing overlaps."""
    total = state.sum(bucket)
    future = Future(devices=[total.device] if total.device.type != "cpu" else [])
    future.set_result(total)
    return future


def compression(strategy: DdpKeys, group: dist.ProcessGroup) -> tuple[Any, Callable[..., Future]] | None:
    """(state, hook) of `strategy.comm_hook` for `register_comm_hook`; None if gradients are not compressed."""
    if strategy.comm_hook == "powersgd":
        state = PowerSgd(group, rank=strategy.powersgd_rank, start_step=strategy.powersgd_start_step)
        return state, powersgd_sum
    hooks = {"none": None, "fp16": fp16_sum, "bf16": bf16_sum}
    hook = hooks[strategy.comm_hook]
    return None if hook is None else (group, hook)
