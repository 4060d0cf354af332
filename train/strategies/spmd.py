"""Single-program strategies: every rank runs the same forward and backward over its shard of rows, weights or both.

Which techniques apply follows from the axes that the preset names: `dp_replicate` alone is DDP, `dp_shard` FSDP2,
both HSDP, `tp` tensor parallelism, `cp` context parallelism, `ep` expert parallelism (no axis of the mesh: it folds
over `dp_shard`). A preset that names an axis runs its code at degree 1 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from train.config.fields import MAX_BUCKET_MB, MAX_STEPS, MAX_WIDTH, number
from train.config.strategy import MESH_AXES, Lossy, Strategy, TrainStep

CP_METHODS = ("allgather", "ring", "ulysses")

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config
    from train.model.transformer import Transformer


# by what they keep: PowerSGD leaves out what later steps make up for, which no bound of one step says
COMM_HOOKS = {"none": None, "fp16": 2e-3, "bf16": 2e-2, "powersgd": None}


@dataclass
class Spmd(Strategy):
    closed_form: ClassVar[bool] = True
    dp_replicate: int | None = None
    dp_shard: int | None = None
    cp: int | None = None
    tp: int | None = None
    ep: int | None = None  # experts split over this many of the dp_shard x cp ranks, which it folds over; -1: all
    cp_method: str = "allgather"  # allgather | ring | ulysses: how attention sees the other ranks' keys and values
    sequence_parallel: bool = True  # tp: activations between blocks sharded over the sequence (Korthikanti et al. 2022)
    loss_parallel: bool = True  # tp: cross-entropy on vocabulary shards, logits are never gathered
    async_tp: bool = False  # tp, compiled, on NCCL: gathers and scatters in pieces, beside the products that need them
    zero_stage: int = number(3, ge=1, lt=4)  # dp_shard: ZeRO's stage within a step (data.py)
    reshard_after_forward: bool = True  # zero_stage 3: gather parameters again for the backward, block by block
    cpu_offload: bool = False  # dp_shard: parameters, gradients and optimiser state wait in host memory
    bucket_mb: float = number(25.0, gt=0, le=MAX_BUCKET_MB)  # dp_replicate: DDP's gradient buckets, MiB
    comm_hook: str = "none"  # dp_replicate: none | fp16 | bf16 | powersgd: gradients lossily compressed on the wire
    powersgd_rank: int = number(4, ge=1, le=MAX_WIDTH)  # of the factors that a matrix's gradient is sent as
    powersgd_start_step: int = number(5, ge=2, le=MAX_STEPS)  # steps before it that are not compressed; at least 2

    def mesh_axes(self) -> dict[str, int]:
        return {axis: degree for axis in MESH_AXES if (degree := getattr(self, axis, None)) is not None}

    def uses_fsdp(self) -> bool:
        """Over dp_shard, and over cp unless DDP takes it."""
        return self.dp_shard is not None or (self.cp is not None and self.dp_replicate is None)

    def uses_ddp(self) -> bool:
        return self.dp_replicate is not None and self.dp_shard is None

    def frees_parameters(self) -> bool:
        """Whether a block's gathered parameters are freed between its forward and its backward."""
        return self.zero_stage == 3 and self.reshard_after_forward

    def splits_backward(self) -> bool:
        """Whether gradients of weights are computed apart from gradients of inputs."""
        return False

    def lossy(self) -> Lossy | None:
        hook = self.comm_hook
        if hook == "none" or hook not in COMM_HOOKS or not self.uses_ddp():  # rules refuse one that cannot act
            return None
        return Lossy(f"strategy.comm_hook={hook}", COMM_HOOKS[hook])

    def needed_backend(self) -> tuple[str, str] | None:
        return ("nccl", "async_tp") if self.async_tp else None

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step, accumulate
        from train.strategies.apply import apply_techniques

        wrapped = apply_techniques(model, mesh, config)
        return Step(model, mesh, config, *accumulate(wrapped, model, config, self.zero_stage))
