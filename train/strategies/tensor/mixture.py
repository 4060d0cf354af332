"""A mixture of experts under `tp`, and the boundaries of every region of split weights.

Each rank routes all tokens alike, and has F/t of every expert's columns and rows, as of a dense feed-forward. Its
result, and so the gradient of its gates, is one term of a sum over ranks; its auxiliary loss would be whole on each, so
it takes 1/t of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard

from train.ranks import collectives
from train.strategies.tensor.layers import ColumnParallelLinear, RowParallelLinear, TensorParallelRouter, shard_weight
from train.strategies.tensor.split import SPLIT_DIM

SEQUENCE_DIM = 1  # of activations BTD


def boundaries(group: ProcessGroup, *, sequence_parallel: bool) -> tuple[Any, Any]:
    """How activations enter a region of split weights, and how its terms are summed when they leave it."""
    if sequence_parallel:
        return (
            partial(collectives.all_gather, dim=SEQUENCE_DIM, group=group),
            partial(collectives.reduce_scatter, dim=SEQUENCE_DIM, group=group),
        )
    return partial(collectives.enter, group=group), partial(collectives.all_reduce, group=group)


def split_mixture(moe: Any, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """All of a mixture but its experts' weights over `tp`: tokens are gathered before it, terms summed after it."""
    join, leave = boundaries(mesh.get_group(), sequence_parallel=sequence_parallel)
    moe.router.__class__ = TensorParallelRouter
    shard_weight(moe.router, mesh, Replicate())
    moe.router.aux_scale /= mesh.size()
    if moe.shared is not None:
        shared: Any = moe.shared
        for linear in (shared.gate, shared.up):
            linear.__class__ = ColumnParallelLinear
            shard_weight(linear, mesh, Shard(SPLIT_DIM["gate"]))
        shared.down.__class__ = RowParallelLinear
        shard_weight(shared.down, mesh, Shard(SPLIT_DIM["down"]))
        shared.down.leave = _as_it_is  # summed with the experts' results, by one collective
    moe.register_forward_pre_hook(lambda module, args: (join(args[0]), *args[1:]))
    moe.register_forward_hook(lambda module, args, y_BTD: leave(y_BTD))


def _as_it_is(x: Tensor) -> Tensor:
    return x
