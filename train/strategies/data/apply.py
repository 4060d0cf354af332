"""Data parallelism. Every rank computes on its own rows; gradients are summed over the ranks.

DDP (`dp_replicate`): every rank has all weights. Sent per step: one all-reduce of the gradients, in buckets that
overlap with the backward (Li et al. 2020).
FSDP2 (`dp_shard`): between steps each rank holds 1/n of every parameter, gradient and optimiser state. `zero_stage`
decides what stays sharded during a step (Rajbhandari et al. 2020). With m microbatches:

    stage  sharded during the step        all-gathers of all parameters   reduce-scatters of all gradients
    1      optimiser state                1                               1
    2      gradients too                  1                               m
    3      parameters too, by blocks      2m (forward and backward)       m

Both axes together are HSDP: FSDP over `dp_shard`, and an all-reduce of the gradients' shards over `dp_replicate`.

Gradients are summed, not averaged, because the loss is already divided by the global number of valid tokens.
"""

import inspect
from collections.abc import Container
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from train.config.technique import Target
from train.strategies.data.comm_hooks import compression
from train.strategies.data.keys import DdpKeys, FsdpKeys
from train.strategies.data.powersgd import PowerSgd

MiB = 2**20


def with_cp(mesh: DeviceMesh, axis: str, axes: Container[str]) -> DeviceMesh:
    """The 1-D mesh of `axis`, joined with `cp` if the strategy has it, because a gradient is summed over both.

    The first call is collective over the world. The method is private (torch 2.11 to 2.13); no public one joins axes.
    """
    return mesh[axis, "cp"]._flatten(f"{axis}.cp") if "cp" in axes else mesh[axis]


def sharding_mesh(mesh: DeviceMesh, axes: Container[str]) -> DeviceMesh:
    """The mesh of FSDP: dp_shard (x cp), and dp_replicate as its first axis if the strategy has it."""
    shards = with_cp(mesh, "dp_shard", axes)
    if "dp_replicate" not in axes:
        return shards
    if "cp" not in axes:
        return mesh["dp_replicate", "dp_shard"]
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards])  # private; slicing warns about joined names


# Annotations in this file are real types, not strings (no `from __future__`), because DDP checks them.
def sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the sum of the bucket over the group. DDP's default is the mean."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class Replica(DistributedDataParallel):
    """DDP that sums. `compression`: what its hook keeps between steps, if it keeps something."""

    compression: PowerSgd | None = None


def apply_ddp(target: Target) -> None:
    """Give the model its weights and wrap it. The weights are equal on all ranks, so nothing is broadcast."""
    import torch._dynamo.config

    keys, axes = target.keys(DdpKeys), target.config.strategy.mesh_axes()
    group = with_cp(target.mesh, "dp_replicate", axes).get_group()
    target.fill_once()

    torch._dynamo.config.optimize_ddp = False  # it would split graphs at buckets, but each block is its own graph
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13 has another name for the option, and warns about the old one
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    no_sync: Any = {sync: False}
    wrapped = Replica(
        target.model,
        process_group=group,
        bucket_cap_mb=keys.bucket_mb,
        gradient_as_bucket_view=True,
        init_sync=False,
        **no_sync,  # the routers' buffers count each rank's own tokens
    )
    state, hook = compression(keys, group) or (group, sum_bucket)
    wrapped.register_comm_hook(state, hook)
    wrapped.compression = state if isinstance(state, PowerSgd) else None
    target.wrapped = wrapped


def microbatch(wrapped: nn.Module, zero_stage: int, *, last: bool) -> AbstractContextManager[None]:
    """The context in which a microbatch runs. Where possible, gradients are reduced after the last one only."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    if isinstance(wrapped, FSDPModule) and zero_stage < 3:
        wrapped.set_reshard_after_backward(last)
        wrapped.set_requires_gradient_sync(last or zero_stage == 2)
    return nullcontext()


def apply_fsdp(target: Target) -> None:
    """Shard a meta model in place, block by block: a block gets its values, and then all but the rank's shard is freed.
    Modules of a block with their own mesh, such as experts under `ep`, are separate units of FSDP.

    With bf16, the blocks are gathered in bf16. The embedding is gathered in its own dtype, because its gradient is a
    sum over many tokens. If the head is tied, this includes all modules in the embedding's unit.
    """
    model, strategy = target.model, target.config.strategy
    reshard_after_forward = strategy.frees_parameters()
    dense_mesh = sharding_mesh(target.mesh, strategy.mesh_axes())
    low = model.compute_dtype if model.compute_dtype is torch.bfloat16 else None
    cast = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(cast_forward_inputs=False)
    offloads = target.keys(FsdpKeys).cpu_offload
    offload = CPUOffloadPolicy(pin_memory=dense_mesh.device_type != "cpu") if offloads else OffloadPolicy()

    def shard(modules: nn.Module | list[Any], policy: MixedPrecisionPolicy, reshard: bool, **own: Any) -> None:
        options: dict[str, Any] = {"mesh": dense_mesh, "mp_policy": policy, "reshard_after_forward": reshard} | own
        fully_shard(modules, offload_policy=offload, **options)

    for name, layer in model.layers.items():
        target.fill(layer, f"layers.{name}.")
        for module in layer.modules():
            if module in target.fsdp_units:
                own_mesh, placement = target.fsdp_units[module]
                shard(module, cast, reshard_after_forward, mesh=own_mesh, shard_placement_fn=placement)
        shard(layer, cast, reshard_after_forward)
    target.fill_once()
    ends = [module for module in (model.embed, model.norm, model.head) if module is not None]
    if model.config.tie_embeddings and len(ends) > 1:
        shard(ends, whole, False)
    else:
        if model.embed is not None:
            shard(model.embed, whole, reshard_after_forward)
        if model.norm is not None:  # not freed, because the backward begins here and would gather it again at once
            shard([model.norm, model.head], cast, False)
    shard(model, whole, False)
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Make FSDP's reduce-scatters sum gradients; their default is the mean over the unit's group."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
