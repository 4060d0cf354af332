"""Data parallelism. Every rank computes on its own rows; gradients are summed over the ranks.

DDP (`dp_replicate`): whole weights everywhere. Sent per step: one all-reduce of the gradients, in buckets that overlap
the backward (Li et al. 2020). FSDP2 (`dp_shard`): each rank holds 1/n of every parameter, gradient and optimiser state
between steps; within a step, `zero_stage` says what stays sharded (Rajbhandari et al. 2020), for m microbatches:

    stage  sharded within the step        all-gathers of all parameters   reduce-scatters of all gradients
    1      optimiser state                1                               1
    2      and gradients                  1                               m
    3      and parameters, block by block 2m (forward and backward)       m

Both axes: HSDP, FSDP inside, an all-reduce of the gradients' shards outside.

Sums, not means: the loss is already divided by the global number of valid tokens.
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

MiB = 2**20


def with_cp(mesh: DeviceMesh, axis: str, axes: Container[str]) -> DeviceMesh:
    """The 1-D mesh of `axis`, joined with `cp` if the strategy has it: both give terms of a gradient's sum.

    Collective over the world when first joined. By a private method (torch 2.11 to 2.13), as no public one joins axes.
    """
    return mesh[axis, "cp"]._flatten(f"{axis}.cp") if "cp" in axes else mesh[axis]


def sharding_mesh(mesh: DeviceMesh, axes: Container[str]) -> DeviceMesh:
    """What FSDP runs over: dp_shard (x cp), in replicas if the strategy has `dp_replicate`."""
    shards = with_cp(mesh, "dp_shard", axes)
    if "dp_replicate" not in axes:
        return shards
    if "cp" not in axes:
        return mesh["dp_replicate", "dp_shard"]
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards])  # private; slicing would warn of joined names


# Annotations here are real types, not strings (no `from __future__`): DDP checks them.
def sum_bucket(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """DDP's communication hook: the sum of the bucket over the group (its default would be the mean)."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def apply_ddp(target: Target) -> None:
    """Wrap the model, with its weights. They are equal on all ranks by construction, so nothing is broadcast."""
    import torch._dynamo.config

    keys, axes = target.keys(DdpKeys), target.config.strategy.mesh_axes()
    group = with_cp(target.mesh, "dp_replicate", axes).get_group()
    target.fill_once()

    torch._dynamo.config.optimize_ddp = False  # blocks are compiled one by one: no graph spans a bucket's edge
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    # torch 2.13 has another name for it, and warns of the old one
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    no_sync: Any = {sync: False}
    wrapped = DistributedDataParallel(
        target.model,
        process_group=group,
        bucket_cap_mb=keys.bucket_mb,
        gradient_as_bucket_view=True,
        init_sync=False,
        **no_sync,  # routers' counts are each rank's own
    )
    wrapped.register_comm_hook(*(compression(keys, group) or (group, sum_bucket)))
    target.wrapped = wrapped


def microbatch(wrapped: nn.Module, zero_stage: int, *, last: bool) -> AbstractContextManager[None]:
    """What a microbatch runs in, so that only the last one sends what can wait for it."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    if isinstance(wrapped, FSDPModule) and zero_stage < 3:
        wrapped.set_reshard_after_backward(last)
        wrapped.set_requires_gradient_sync(last or zero_stage == 2)
    return nullcontext()


def apply_fsdp(target: Target) -> None:
    """Shard a meta model in place, block by block: each block is given its values, then all but a shard is freed.
    Modules of a block that have a mesh of their own, as experts under `ep`, are units of their own.

    Under bf16 the blocks are gathered in bf16. The embedding is gathered in its own dtype, as its gradient sums many
    tokens; so is everything that shares a group with it when the head is tied.
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
        if model.norm is not None:  # the backward begins here: freed, it would be gathered at once
            shard([model.norm, model.head], cast, False)
    shard(model, whole, False)
    sum_gradients(model)


def sum_gradients(model: nn.Module) -> None:
    """Reduce-scatters sum, whatever the size of a unit's group; their default is the mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
