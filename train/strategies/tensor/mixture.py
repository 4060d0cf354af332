"""A mixture of experts under `tp`, and the boundaries of every region with split weights.

Every rank routes all tokens in the same way, and has F/t of every expert's columns and rows, as in a dense
feed-forward. Its result, and therefore the gradient of its gates, is one term of a sum over ranks. Each rank computes
the whole auxiliary loss, so it is multiplied by 1/t.
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

# The ends of the names of modules whose output, or its gradient, is one term of a sum over `tp`. The hooks of the
# mixture complete the sum.
PARTIAL_OUTPUTS = (".feed_forward.dispatch", ".feed_forward.shared", ".shared.down")
PARTIAL_GRADIENTS = (".feed_forward.router",)


def boundaries(group: ProcessGroup, dim: int | None) -> tuple[Any, Any]:
    """(How activations enter a region with split weights, how the region's results are summed when they leave it).
    `dim`: the dimension that sequence parallelism splits; None without it."""
    if dim is not None:
        return (
            partial(collectives.all_gather, dim=dim, group=group),
            partial(collectives.reduce_scatter, dim=dim, group=group),
        )
    return partial(collectives.enter, group=group), partial(collectives.all_reduce, group=group)


def split_mixture(moe: Any, mesh: DeviceMesh, dim: int | None) -> None:
    """Split a mixture over `tp`, except the weights of its experts. Tokens are gathered before the mixture, and the
    ranks' results are summed after it. `dim`: as of `boundaries`."""
    join, leave = boundaries(mesh.get_group(), dim)
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
        shared.down.leave = _as_it_is  # one collective sums it together with the experts' results
    moe.register_forward_pre_hook(lambda module, args: (join(args[0]), *args[1:]))
    moe.register_forward_hook(lambda module, args, y_BTD: leave(y_BTD))


def _as_it_is(x: Tensor) -> Tensor:
    return x
