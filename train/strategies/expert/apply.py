"""Expert parallelism (GShard; Switch, Fedus et al. 2022), over `ep`: each rank holds E/ep of every layer's experts.

    dp_shard x cp ranks       0 1 2 3         dense weights: FSDP over all four
    = efsdp 2 x ep 2       ep 0 1             experts 0-3 on ranks 0 2, experts 4-7 on ranks 1 3: FSDP over `efsdp`
                              2 3             tokens: all-to-all between 0 1, and between 2 3

`ep` folds over the data axes, the innermost first. Its ranks have different rows, and tokens are sent to their experts
and back. Sent per layer and microbatch: E counts, then 2 all-to-alls of K x N x D elements in the forward and 2 in the
backward, whose parts are uneven because the router decides them.

The backward of the all-to-all brings an expert the gradients of the tokens of all `ep` ranks. So its gradient is
complete over `ep`, and only summed over `efsdp`; it is neither divided nor multiplied by `ep`.

With `tp`, with or without `ep`, each rank has F/t of every expert's columns and rows (tensor/mixture.py).
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

FOLDED = {"dp_shard": "efsdp", "cp": "ep"}  # axes of the mesh, and the axes that replace them in the experts' mesh


class ShardedExperts(Experts):
    """This rank's experts, or this rank's columns and rows of every expert."""

    def forward(self, x_ND: Tensor, num_rows_E: Tensor) -> Tensor:
        return self.compute(x_ND, num_rows_E, local(self.gate), local(self.up), local(self.down))


class ExpertParallelDispatch(nn.Module):
    """`LocalDispatch` over ranks: rows are sent to the rank that has their expert, and results are sent back."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.group = group

    @torch.compiler.disable  # sizes follow from the data, so that each would be another graph
    def forward(self, x_ND: Tensor, chosen_NK: Tensor, experts: nn.Module) -> Tensor:
        size, k = self.group.size(), chosen_NK.shape[1]
        order, inverse, num_rows_E = sorted_by_expert(chosen_NK, cast(Experts, experts).num_experts)
        leaving = num_rows_E.unflatten(0, (size, -1))  # [to rank, its experts]
        coming = collectives.exchange(leaving.contiguous(), self.group)  # [from rank, own experts]
        # The host waits for the device here, and only here, because it needs the sizes of the messages.
        send, receive = torch.stack((leaving.sum(1), coming.sum(1))).tolist()
        rows = collectives.all_to_all(gather_rows(x_ND, order, inverse, k), send, receive, self.group)
        own = torch.arange(coming.shape[1], device=coming.device).repeat(size)
        # rows arrive sorted by sender, then by expert
        expert = own.repeat_interleave(coming.flatten(), output_size=sum(receive))
        by_expert, by_sender, num_rows = sorted_by_expert(expert, coming.shape[1])
        y = gather_rows(experts(gather_rows(rows, by_expert, by_sender), num_rows), by_sender, by_expert)
        y = collectives.all_to_all(y, receive, send, self.group)
        return gather_rows(y, inverse, order).unflatten(0, (-1, k))


def apply_experts(target: Target) -> None:
    """Make a mixture model on meta run with the axes that the strategy names, in place. `tp` is applied before.

    If `ep` is named, FSDP shards the experts over a mesh of their own. This makes process groups, which is collective.
    """
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
    """Make the auxiliary loss a mean over the sequences of the global batch, on all ranks and microbatches."""
    for router in routers(model.layers).values():
        router.aux_scale /= num_sequences


def width_shard(experts: Experts, parameter: nn.Parameter) -> Shard:
    """The dimension in which FSDP shards a weight of the experts: their width D, which neither `ep` nor `tp` splits. To
    split a dimension twice needs a private placement (`_StridedShard`), and E/ep may be less than the number of ranks.
    """
    return next(Shard(dim) for name, dim in EXPERT_WIDTH_DIM.items() if getattr(experts, name) is parameter)


def mixtures(model: Transformer) -> list[MixtureOfExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def expert_mesh(mesh: DeviceMesh, degree: int) -> DeviceMesh:
    """A second mesh of the same ranks as `mesh`, with efsdp x ep in the place of dp_shard x cp. torch 2.13 has no
    public method that folds axes of a mesh."""
    sizes = {axis: mesh[axis].size() for axis in MESH_AXES}
    folded = folded_ranks(sizes)
    ep = folded if degree == -1 else degree
    shape = {FOLDED.get(axis, axis): size for axis, size in (sizes | {"dp_shard": folded // ep, "cp": ep}).items()}
    # These axes get new groups, also if torch would use the world's group, so that the groups have names and that
    # tokens do not wait for FSDP's messages.
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
