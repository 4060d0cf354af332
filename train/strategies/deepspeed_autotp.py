"""DeepSpeed's AutoTP in training as a `TrainStep`: Megatron's cut of every block (Shoeybi et al. 2019), under ZeRO.

    x -> norm -> [wq wk wv] rows -> heads of this rank -> [wo] columns -> all-reduce -> + x
    x -> norm -> [gate up]  rows -> hidden of this rank -> [down] columns -> all-reduce -> + x

Embedding, norms and head are whole on every rank, and so are activations between the products. Sent over `tp` per layer
and microbatch: 7 all-reduces of B·T·D, 2 forward, and backward one for each of wq, wk, wv, gate and up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from train.strategies.deepspeed_engine import ZeroStep

# module names by the dimension of their weight that is cut
CUT = {0: ("wq", "wk", "wv", "gate", "up"), 1: ("wo", "down")}
DEEPSPEED_NAMES = {0: "column", 1: "row"}


def partition() -> dict[str, Any]:
    """CUT in DeepSpeed's words. Left to guess by names that it knows from Hugging Face, it would find nothing here."""
    specs = [
        {"patterns": [rf".*\.({'|'.join(names)})\.weight$"], "partition_type": DEEPSPEED_NAMES[dim]}
        for dim, names in CUT.items()
    ]
    return {"use_default_specs": False, "layer_specs": specs}


class AutoTpStep(ZeroStep):
    """`tp` by AutoTP; ZeRO's data ranks are those of `dp_shard`, one if it is not named."""

    def initialise(self, module: nn.Module, mpu: object | None, **more: Any) -> None:
        """Also cuts the weights, in place: names and parameters stay."""
        whole = {p: p.shape for p in module.parameters()}
        self.use_mesh()
        tp = self.mesh["tp"].size()
        super().initialise(module, mpu, tensor_parallel={"autotp_size": tp, "partition_config": partition()}, **more)
        dims = {name: dim for dim, names in CUT.items() for name in names}
        self.cut = {p: dims[name.split(".")[-2]] for name, p in self.parameters.items() if name.split(".")[-2] in dims}
        for p, shape in whole.items():  # a pattern that matches nothing is silent
            held = torch.Size(getattr(p, "ds_shape", p.shape))
            assert held == torch.Size(n // tp if self.cut.get(p) == dim else n for dim, n in enumerate(shape))

    def use_mesh(self) -> None:
        """Have AutoTP use the mesh's groups. It would make them itself, once in a process, whatever comes later: they
        are private variables of a module (deepspeed 0.19)."""
        groups = self.deepspeed.utils.groups
        groups._TENSOR_MODEL_PARALLEL_GROUP = groups._MODEL_PARALLEL_GROUP = self.mesh["tp"].get_group()
        groups._DATA_PARALLEL_GROUP = self.mesh["dp_shard"].get_group()

    def full(self, of: Callable[[nn.Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        return super().full(lambda p: self.sharded(p, of(p)))

    def sharded(self, parameter: nn.Parameter, value: Tensor | None) -> Tensor | None:
        """A rank's cut of something shaped as this parameter, as the DTensor that it is."""
        if value is None or parameter not in self.cut:
            return value
        return DTensor.from_local(value, self.mesh["tp"], [Shard(self.cut[parameter])], run_check=False)
