"""Single-program strategies: every rank runs the same forward and backward over its shard of rows, weights or both.

Which techniques apply follows from the axes that the preset names: `dp_replicate` alone is DDP, `dp_shard` FSDP2,
both HSDP, `tp` tensor parallelism, `cp` context parallelism, `ep` expert parallelism (no axis of the mesh: it folds
over `dp_shard`). A preset that names an axis runs its code at degree 1 too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from train.config.strategy import TrainStep
from train.strategies.context.keys import ContextKeys
from train.strategies.data.keys import DdpKeys, FsdpKeys
from train.strategies.expert.keys import ExpertKeys
from train.strategies.tensor.keys import TensorKeys

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config
    from train.model.transformer import Transformer


@dataclass
class Spmd(ExpertKeys, TensorKeys, ContextKeys, FsdpKeys, DdpKeys):
    closed_form: ClassVar[bool] = True

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step, accumulate
        from train.strategies.apply import apply_techniques

        wrapped = apply_techniques(model, mesh, config)
        return Step(model, mesh, config, *accumulate(wrapped, model, config, self.zero_stage))
