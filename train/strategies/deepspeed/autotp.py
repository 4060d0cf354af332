"""DeepSpeed's AutoTP in training as a `TrainStep`: blocks are split as in Megatron (Shoeybi et al. 2019), with ZeRO.

    x -> norm -> [wq wk wv] rows -> heads of this rank -> [wo] columns -> all-reduce -> + x
    x -> norm -> [gate up]  rows -> hidden of this rank -> [down] columns -> all-reduce -> + x

The embedding, norms and head are whole on every rank, and so are activations between blocks. With fewer KV heads than
ranks, AutoTP would split a head. Then wk and wv stay whole too, and the lab's `SharedHeadLinear` computes only the KV
head that the rank's query heads need. Sent over `tp` per layer and microbatch: 7 all-reduces of B·T·D, of which 2 are
in the forward, and one is in the backward for each of wq, wk, wv, gate and up. If wk and wv are whole, the gradient of
each needs one more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from train.config.shapes import kv_shards
from train.model.transformer import Linear
from train.ranks import collectives
from train.ranks.state import Piece
from train.strategies.deepspeed.engine import ZeroStep
from train.strategies.deepspeed.split import split_dims

DEEPSPEED_NAMES = {0: "column", 1: "row"}


def partition(cut: dict[str, int]) -> dict[str, Any]:
    """DeepSpeed's configuration of the modules that are split. Without it, DeepSpeed looks for names of Hugging Face's
    modules, which this model does not have."""
    specs = [
        {"patterns": [rf".*\.{name}\.weight$"], "partition_type": DEEPSPEED_NAMES[dim]} for name, dim in cut.items()
    ]
    return {"use_default_specs": False, "layer_specs": specs}


class SharedHeadLinear(Linear):
    """wk or wv, whole on every rank. Each rank computes only the KV head of its own query heads. The backward sums the
    gradients of the weight and of the input over tp."""

    group: ProcessGroup
    rows: slice

    def forward(self, x: Tensor) -> Tensor:
        weight = collectives.enter(self.weight, self.group)[self.rows]
        return F.linear(collectives.enter(x, self.group), weight.to(x.dtype))


class AutoTpStep(ZeroStep):
    """`tp` by AutoTP. ZeRO's data ranks are those of `dp_shard`; there is one if the strategy does not name it."""

    def initialise(self, module: nn.Module, mpu: object | None, **more: Any) -> None:
        """Make the engine and split the weights in place: the names and the parameter objects do not change."""
        whole = {p: p.shape for p in module.parameters()}
        self.use_mesh()
        tp = self.mesh["tp"].size()
        model = self.config.model
        dims = split_dims(model, tp)
        if (shards := kv_shards(model, tp)) < tp:
            self.share_heads(tp // shards)
            # DeepSpeed reads this number, and would otherwise split layers over the first ranks only, one per KV head.
            self.model.config = dataclasses.replace(model, num_kv_heads=model.num_heads)
        super().initialise(
            module, mpu, tensor_parallel={"autotp_size": tp, "partition_config": partition(dims)}, **more
        )
        self.model.config = model
        self.cut = {p: dims[name.split(".")[-2]] for name, p in self.parameters.items() if name.split(".")[-2] in dims}
        for p, shape in whole.items():  # DeepSpeed does not report a pattern that matches nothing
            local_shape = torch.Size(getattr(p, "ds_shape", p.shape))
            assert local_shape == torch.Size(n // tp if self.cut.get(p) == dim else n for dim, n in enumerate(shape))

    def share_heads(self, sharing: int) -> None:
        """Make each group of `sharing` neighbouring ranks of tp compute the same KV head."""
        group = self.mesh["tp"].get_group()
        head = group.rank() // sharing
        layers: Iterable[Any] = self.model.layers.values()
        for attention in (layer.attention for layer in layers):
            for linear in (attention.wk, attention.wv):
                linear.__class__ = SharedHeadLinear
                linear.group = group
                linear.rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)

    def use_mesh(self) -> None:
        """Make AutoTP use the mesh's groups. Its own groups would be made once per process and never change: they are
        private variables of a module (deepspeed 0.19)."""
        groups = self.deepspeed.utils.groups
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = self.mesh["tp"].get_group()
        groups._DATA_PARALLEL_GROUP = self.mesh["dp_shard"].get_group()

    def full(self, of: Callable[[nn.Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        return super().full(lambda p: self.sharded(p, of(p)))

    def pieces(self) -> Iterator[Piece]:
        """A part of a flat moment of a weight that is split has the rank's number before its offset: it has no copy."""
        rank, dims = self.mesh["tp"].get_local_rank(), {name: self.cut.get(p) for name, p in self.parameters.items()}
        for piece in super().pieces():
            offset, dim = list(piece.offset), dims.get(piece.name)
            if dim is not None and len(offset) == 2:
                offset[dim] = rank * piece.tensor.shape[dim]
            elif dim is not None:
                offset = [rank, *offset]
            yield dataclasses.replace(piece, offset=tuple(offset))

    def part_of(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        tp = self.mesh["tp"]
        dim = self.cut.get(parameter)
        return whole if dim is None else whole.chunk(tp.size(), dim)[tp.get_local_rank()]

    def sharded(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor | None:
        """This rank's shard of a tensor with the parameter's shape, as a DTensor."""
        if value is None or parameter not in self.cut:
            return value
        return DTensor.from_local(value, self.mesh["tp"], [Shard(self.cut[parameter])], run_check=False)
