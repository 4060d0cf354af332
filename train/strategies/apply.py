"""The techniques of an SPMD model, or of one pipeline stage, in the only valid order.

Tensor parallelism first, as it decides what a weight is, and expert parallelism, which does too; then recomputation,
round what is computed; then compilation, round both; data parallelism last, as its hooks must see the finished blocks'
parameters, outside compiled code.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import CompileConfig, Config
from train.config.strategy import LOSS_AXES, MESH_AXES
from train.model.transformer import Transformer
from train.model.weights import derived_seed, materialise
from train.ranks.distributed import own_device
from train.strategies.recompute.apply import apply_checkpointing

if TYPE_CHECKING:
    from train.strategies.spmd import Spmd


def apply_techniques(
    model: Transformer, mesh: DeviceMesh, config: Config, heads: DeviceMesh | None = None
) -> nn.Module:
    """Apply the techniques whose axes the preset names, and give the weights memory. Returns what to call. `heads`:
    what `tensor.head_mesh` gives for the axis `tp`, where several models share it; else it is made here."""
    strategy: Spmd = config.strategy  # type: ignore[assignment]
    axes = strategy.mesh_axes()
    device = own_device(mesh)
    model.rope = model.rope.to(device)
    seed_dropout(mesh, config)
    if "tp" in axes:
        from train.strategies.tensor.apply import apply_tp, head_mesh, pipeline_products

        if strategy.async_tp:
            pipeline_products(mesh["tp"].get_group())
        if heads is None:
            heads = head_mesh(mesh["tp"], config.model)
        options = {"sequence_parallel": strategy.sequence_parallel, "loss_parallel": strategy.loss_parallel}
        apply_tp(model, mesh["tp"], heads, **options)
    if "cp" in axes:
        from train.strategies.context.apply import apply_cp

        apply_cp(model, mesh["cp"], method=strategy.cp_method, seq_len=config.train.seq_len)
    expert_mesh = None
    if config.model.num_experts:
        from train.strategies.expert.apply import apply_experts

        expert_mesh = apply_experts(model, mesh, config)
    for layer in model.layers.values():
        apply_checkpointing(layer, config.train.activation_checkpointing, splits_backward=strategy.splits_backward())
    if config.compile.enabled:
        for module in (*model.layers.values(), model.loss):
            apply_compile(module, config.compile)
    fill = partial(materialise, config=config.model, seed=config.train.seed, device=device)
    if strategy.uses_fsdp():
        from train.strategies.data.apply import apply_fsdp, sharding_mesh

        apply_fsdp(
            model,
            sharding_mesh(mesh, axes),
            fill,
            expert_mesh,
            reshard_after_forward=strategy.frees_parameters(),
            cpu_offload=strategy.cpu_offload,
        )
        return model
    fill(model, "")
    if strategy.uses_ddp():
        from train.strategies.data.apply import apply_ddp, with_cp
        from train.strategies.data.comm_hooks import compression

        group = with_cp(mesh, "dp_replicate", axes).get_group()
        return apply_ddp(model, group, bucket_mb=strategy.bucket_mb, hook=compression(strategy, group))
    return model


def seed_dropout(mesh: DeviceMesh, config: Config) -> None:
    """Ranks that hold other tokens or layers draw other masks; ranks that hold the same tokens, as tp's do without
    sequence parallelism, draw the same."""
    apart = (*LOSS_AXES, *(("tp",) if config.strategy.sequence_parallel else ()))  # type: ignore[attr-defined]
    place = [mesh[axis].get_local_rank() if axis in apart else 0 for axis in MESH_AXES]
    torch.manual_seed(derived_seed(config.train.seed, "dropout", *place))


def apply_compile(module: nn.Module, config: CompileConfig) -> None:
    """Compile the module's forward alone: hooks that data parallelism adds later run outside, in eager Python."""
    module.forward = torch.compile(module.forward, mode=config.mode.value)
