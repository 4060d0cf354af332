"""Expert parallelism (GShard; Switch, Fedus et al. 2022), over `ep`: each rank holds E/ep of every layer's experts.

    dp_shard x cp ranks       0 1 2 3         dense weights: FSDP over all four
    = efsdp 2 x ep 2       ep 0 1             experts 0-3 on ranks 0 2, experts 4-7 on ranks 1 3: FSDP over `efsdp`
                              2 3             tokens: all-to-all between 0 1, and between 2 3

`ep` folds over the data axes, innermost first: its ranks read other rows, and tokens travel to their experts and back.
Sent per layer and microbatch: 2 all-to-alls of K x N x D elements, uneven as the router chose, and 2 in the backward;
before them E counts. An expert's gradient comes from the tokens of all `ep` ranks by the all-to-all's adjoint, so it is
complete over `ep` and summed over `efsdp` alone: neither divided nor multiplied by `ep`.

Under `tp`, with or without `ep`: each rank routes all tokens alike, and has F/t of every expert's columns and rows, as
of a dense feed-forward. Its result, and so the gradient of its gates, is one term of a sum over ranks; its auxiliary
loss would be whole on each, so it takes 1/t of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from train.config.schema import Config
from train.config.strategy import folded_ranks
from train.model.moe import Experts, MixtureOfExperts, Router, routers, sorted_by_expert, take
from train.model.transformer import Transformer
from train.ranks import collectives
from train.ranks.gradients import local
from train.strategies.tensor.apply import ColumnParallelLinear, RowParallelLinear, boundaries, shard_weight

EXPERT_DIM = 0
FFN_DIMS = {"gate": 1, "up": 1, "down": 2}
WIDTH_DIMS = {"gate": 2, "up": 2, "down": 1}


class ShardedExperts(Experts):
    """This rank's experts, or its columns and rows of each."""

    def forward(self, x_ND: Tensor, num_rows_E: Tensor) -> Tensor:
        return self.compute(x_ND, num_rows_E, local(self.gate), local(self.up), local(self.down))


class TensorParallelRouter(Router):
    """A whole weight on whole sequences; its gradient here is one term of a sum over `tp` (see above)."""

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(x_BTD, cast(DTensor, self.weight).to_local(grad_placements=[Partial()]))


class ExpertParallelDispatch(nn.Module):
    """`LocalDispatch` over ranks: rows go to the rank that has their expert, results come back the same way."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, experts: nn.Module) -> Tensor:
        size, k = self.group.size(), chosen_NK.shape[1]
        order, inverse, num_rows_E = sorted_by_expert(chosen_NK, cast(Experts, experts).num_experts)
        leaving = num_rows_E.unflatten(0, (size, -1))  # [to rank, its experts]
        coming = collectives.exchange(leaving.contiguous(), self.group)  # [from rank, own experts]
        # the one wait for the device: the sizes of what is sent
        send, receive = torch.stack((leaving.sum(1), coming.sum(1))).tolist()
        rows = collectives.all_to_all(take(x_ND, order, inverse, k), send, receive, self.group)
        own = torch.arange(coming.shape[1], device=coming.device).repeat(size)
        expert = own.repeat_interleave(coming.flatten(), output_size=sum(receive))  # they came by sender, then expert
        by_expert, by_sender, num_rows = sorted_by_expert(expert, coming.shape[1])
        y = take(experts(take(rows, by_expert, by_sender), num_rows), by_sender, by_expert)
        y = collectives.all_to_all(y, receive, send, self.group)
        return take(y, inverse, order).unflatten(0, (-1, k))


def apply_experts(model: Transformer, mesh: DeviceMesh, config: Config) -> DeviceMesh | None:
    """Make a mixture model on meta run under the axes that the preset names, in place; `tp` is applied before.

    Returns the data-parallel mesh of the experts where `ep` gives them one of their own. Collective if so: it makes
    process groups."""
    strategy: Any = config.strategy
    axes = strategy.mesh_axes()
    set_aux_scale(model, num_sequences=config.train.global_batch_size)
    if mesh["cp"].size() > 1:
        for router in routers(model.layers).values():
            router.sequence_shards = mesh["cp"].size()
            router.sum_over_sequence = partial(collectives.sum_of, group=mesh["cp"].get_group())
    if "tp" in axes:
        for moe in mixtures(model):
            split_columns(moe, mesh["tp"], sequence_parallel=strategy.sequence_parallel)
    if strategy.ep is None:
        if "tp" in axes:
            split_experts(model, mesh["tp"])
        return None
    own_mesh = expert_mesh(mesh, strategy.ep)
    split_experts(model, own_mesh["ep", "tp"] if "tp" in axes else own_mesh["ep"])
    for moe in mixtures(model):
        moe.dispatch = ExpertParallelDispatch(own_mesh["ep"].get_group())
    return own_mesh["dp_replicate", "efsdp"] if "dp_replicate" in axes else own_mesh["efsdp"]


def mixtures(model: Transformer) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def set_aux_scale(model: Transformer, *, num_sequences: int) -> None:
    """The auxiliary loss is a mean over the sequences of the global batch, whatever rank or microbatch has them."""
    for router in routers(model.layers).values():
        router.aux_scale = 1.0 / num_sequences


def expert_mesh(mesh: DeviceMesh, degree: int) -> DeviceMesh:
    """The same ranks as `mesh`, with dp_shard x cp seen as efsdp x ep. A mesh of its own, as a public way to fold axes
    of one into another does not exist (torch 2.13)."""
    sizes = {axis: mesh[axis].size() for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp")}
    folded = folded_ranks(sizes)
    ep = folded if degree == -1 else degree
    shape = {"pp": sizes["pp"], "dp_replicate": sizes["dp_replicate"], "efsdp": folded // ep, "ep": ep}
    # groups of their own, also where torch would take the world's: tokens do not queue behind FSDP, and have a name
    own: dict[int | str, Any] = dict.fromkeys(("efsdp", "ep"), dist.get_backend(mesh["dp_shard"].get_group()))
    return init_device_mesh(
        mesh.device_type, (*shape.values(), sizes["tp"]), mesh_dim_names=(*shape, "tp"), backend_override=own
    )


def split_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Declare the experts' weights (on meta) as DTensors over `mesh`: experts over `ep`, columns and rows over `tp`."""
    for moe in mixtures(model):
        moe.experts.__class__ = ShardedExperts
        for name, ffn_dim in FFN_DIMS.items():
            dims = {"ep": EXPERT_DIM, "tp": ffn_dim}
            placements = [Shard(dims[axis]) for axis in mesh.mesh_dim_names or ()]
            weight = distribute_tensor(getattr(moe.experts, name).detach(), mesh, placements, src_data_rank=None)
            setattr(moe.experts, name, nn.Parameter(weight))


def split_columns(moe: MixtureOfExperts, mesh: DeviceMesh, *, sequence_parallel: bool) -> None:
    """All of a mixture but its experts' weights over `tp`: tokens are gathered before it, terms summed after it."""
    join, leave = boundaries(mesh.get_group(), sequence_parallel=sequence_parallel)
    moe.router.__class__ = TensorParallelRouter
    shard_weight(moe.router, mesh, Replicate())
    moe.router.aux_scale /= mesh.size()
    if moe.shared is not None:
        shared: Any = moe.shared
        for linear in (shared.gate, shared.up):
            linear.__class__ = ColumnParallelLinear
            shard_weight(linear, mesh, Shard(0))
        shared.down.__class__ = RowParallelLinear
        shard_weight(shared.down, mesh, Shard(1))
        shared.down.leave = _as_it_is  # summed with the experts' results, by one collective
    moe.register_forward_pre_hook(lambda module, args: (join(args[0]), *args[1:]))
    moe.register_forward_hook(lambda module, args, y_BTD: leave(y_BTD))


def _as_it_is(x: Tensor) -> Tensor:
    return x


def apply_expert_fsdp(
    layer: Any, mesh: DeviceMesh, policy: MixedPrecisionPolicy, offload: OffloadPolicy, *, reshard_after_forward: bool
) -> None:
    """Shard what `ep` and `tp` leave of a layer's experts over the `efsdp` ranks: by the width D, which neither splits.

    Splitting a dimension twice would be a private placement (`_StridedShard`), and E/ep may be fewer than the ranks.
    """
    experts: Experts = layer.feed_forward.experts
    dims = {id(getattr(experts, name)): dim for name, dim in WIDTH_DIMS.items()}
    fully_shard(
        experts,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=offload,
        reshard_after_forward=reshard_after_forward,
        shard_placement_fn=lambda p: Shard(dims[id(p)]),
    )
