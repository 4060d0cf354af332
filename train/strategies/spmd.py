"""SPMD strategies: every rank runs the same forward and backward on its shard of rows, of weights, or of both.

The axes that the preset names decide which techniques apply: `dp_replicate` alone is DDP, `dp_shard` is FSDP2, both
together are HSDP, `tp` is tensor parallelism, `cp` is context parallelism, and `ep` is expert parallelism (`ep` is not
an axis of the mesh, but is folded over `dp_shard`). If a preset names an axis, its code also runs at degree 1.
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
        return Step(model, mesh, config, *accumulate(wrapped, model, config, self.zero_stage), wrapped=[wrapped])
