"""Expert parallelism (GShard; Switch, Fedus et al. 2022), over `ep`: each rank holds E/ep of every layer's experts.

    dp_shard x cp ranks       0 1 2 3         dense weights: FSDP over all four
    = efsdp 2 x ep 2       ep 0 1             experts 0-3 on ranks 0 2, experts 4-7 on ranks 1 3: FSDP over `efsdp`
                              2 3             tokens: all-to-all between 0 1, and between 2 3

`ep` folds over the data axes, innermost first: its ranks read other rows, and tokens travel to their experts and back.
Sent per layer and microbatch: 2 all-to-alls of K x N x D elements, uneven as the router chose, and 2 in the backward;
before them E counts. An expert's gradient comes from the tokens of all `ep` ranks by the all-to-all's adjoint, so it is
complete over `ep` and summed over `efsdp` alone: neither divided nor multiplied by `ep`.

Under `tp`, with or without `ep`, each rank has F/t of every expert's columns and rows (tensor/mixture.py).
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from train.config.strategy import MESH_AXES, folded_ranks
from train.config.technique import Target
from train.model.moe import Experts, MixtureOfExperts, gather_rows, routers, sorted_by_expert
from train.model.transformer import Transformer
from train.ranks import collectives
from train.ranks.gradients import local
from train.strategies.data.split import EXPERT_WIDTH_DIM
from train.strategies.expert.split import EXPERT_DIM
from train.strategies.tensor.split import EXPERT_SPLIT_DIM

FOLDED = {"dp_shard": "efsdp", "cp": "ep"}  # axes of the mesh, and what stands in their places in the experts' mesh


class ShardedExperts(Experts):
    """This rank's experts, or its columns and rows of each."""

    def forward(self, x_ND: Tensor, num_rows_E: Tensor) -> Tensor:
        return self.compute(x_ND, num_rows_E, local(self.gate), local(self.up), local(self.down))


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
        rows = collectives.all_to_all(gather_rows(x_ND, order, inverse, k), send, receive, self.group)
        own = torch.arange(coming.shape[1], device=coming.device).repeat(size)
        expert = own.repeat_interleave(coming.flatten(), output_size=sum(receive))  # they came by sender, then expert
        by_expert, by_sender, num_rows = sorted_by_expert(expert, coming.shape[1])
        y = gather_rows(experts(gather_rows(rows, by_expert, by_sender), num_rows), by_sender, by_expert)
        y = collectives.all_to_all(y, receive, send, self.group)
        return gather_rows(y, inverse, order).unflatten(0, (-1, k))


def apply_experts(target: Target) -> None:
    """Make a mixture model on meta run under the axes that the strategy names, in place; `tp` is applied before.

    Where `ep` is named, FSDP shards the experts over a mesh of their own. Collective then: it makes process groups."""
    model, mesh, config = target.model, target.mesh, target.config
    axes, degree = config.strategy.mesh_axes(), config.strategy.expert_degree()
    scale_aux_loss(model, num_sequences=config.train.global_batch_size)
    if mesh["cp"].size() > 1:
        for router in routers(model.layers).values():
            router.sequence_shards = mesh["cp"].size()
            router.sum_over_sequence = partial(collectives.sum_of, group=mesh["cp"].get_group())
    if degree is None:
        if "tp" in axes:
            split_experts(model, mesh["tp"])
        return
    own_mesh = expert_mesh(mesh, degree)
    split_experts(model, own_mesh["ep", "tp"] if "tp" in axes else own_mesh["ep"])
    data_mesh = own_mesh["dp_replicate", "efsdp"] if "dp_replicate" in axes else own_mesh["efsdp"]
    for moe in mixtures(model):
        moe.dispatch = ExpertParallelDispatch(own_mesh["ep"].get_group())
        target.fsdp_units[moe.experts] = (data_mesh, partial(width_shard, moe.experts))


def scale_aux_loss(model: Transformer, *, num_sequences: int) -> None:
    """The auxiliary loss is a mean over the sequences of the global batch, whatever rank or microbatch has them."""
    for router in routers(model.layers).values():
        router.aux_scale /= num_sequences


def width_shard(experts: Experts, parameter: nn.Parameter) -> Shard:
    """How FSDP shards what `ep` and `tp` leave of the experts: by their width D, which neither splits. Splitting a
    dimension twice would be a private placement (`_StridedShard`), and E/ep may be fewer than the ranks."""
    return next(Shard(dim) for name, dim in EXPERT_WIDTH_DIM.items() if getattr(experts, name) is parameter)


def mixtures(model: Transformer) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def expert_mesh(mesh: DeviceMesh, degree: int) -> DeviceMesh:
    """The same ranks as `mesh`, with dp_shard x cp seen as efsdp x ep. A mesh of its own, as a public way to fold axes
    of one into another does not exist (torch 2.13)."""
    sizes = {axis: mesh[axis].size() for axis in MESH_AXES}
    folded = folded_ranks(sizes)
    ep = folded if degree == -1 else degree
    shape = {FOLDED.get(axis, axis): size for axis, size in (sizes | {"dp_shard": folded // ep, "cp": ep}).items()}
    # groups of their own, also where torch would take the world's: tokens do not queue behind FSDP, and have a name
    own: dict[int | str, Any] = dict.fromkeys(("efsdp", "ep"), dist.get_backend(mesh["dp_shard"].get_group()))
    return init_device_mesh(mesh.device_type, tuple(shape.values()), mesh_dim_names=tuple(shape), backend_override=own)


def split_experts(model: Transformer, mesh: DeviceMesh) -> None:
    """Declare the experts' weights (on meta) as DTensors over `mesh`: experts over `ep`, columns and rows over `tp`."""
    for moe in mixtures(model):
        moe.experts.__class__ = ShardedExperts
        for name, ffn_dim in EXPERT_SPLIT_DIM.items():
            dims = {"ep": EXPERT_DIM, "tp": ffn_dim}
            placements = [Shard(dims[axis]) for axis in mesh.mesh_dim_names or ()]
            weight = distribute_tensor(getattr(moe.experts, name).detach(), mesh, placements, src_data_rank=None)
            setattr(moe.experts, name, nn.Parameter(weight))
