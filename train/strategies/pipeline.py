"""Pipeline parallelism: consecutive layers on consecutive ranks of `pp`; `spmd.py`'s techniques apply to each stage.

    rank 0   F0 F1 F2 F3 . . . . B0 B1 B2 B3        GPipe (Huang et al. 2019): bubble (p-1)/(m+p-1)
    rank 1   . F0 F1 F2 F3 B0 B1 B2 B3 .            1F1B (Narayanan et al. 2019): the same bubble, and
                                                    at most p microbatches' activations alive instead of m
Sent per step: 2(p-1) x microbatches x (B x T x D) elements, activations forward and their gradients back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.strategies.base import TrainStep
from train.strategies.spmd import Spmd

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config import Config
    from train.model import Transformer


SCHEDULES = ("gpipe", "1f1b")


def layers_of_stage(num_layers: int, num_stages: int, stage: int) -> range:
    """Consecutive layers, as equal as can be; the first stages take one more, as the last has the head."""
    base, extra = divmod(num_layers, num_stages)
    start = stage * base + min(stage, extra)
    return range(start, start + base + (stage < extra))


@dataclass
class Pipeline(Spmd):
    pp: int | None = None
    schedule: str = "1f1b"  # gpipe | 1f1b
    zero_stage: int = 1  # torch's schedules gather a stage's parameters and reduce its gradients once a step
    reshard_after_forward: bool = False

    def frees_parameters(self) -> bool:
        return self.reshard_after_forward

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step
        from train.strategies.apply import apply_techniques
        from train.strategies.stages import keep_stage, pipelined

        keep_stage(model, mesh["pp"])
        wrapped = apply_techniques(model, mesh, config)
        return Step(model, mesh, config, *pipelined(wrapped, model, mesh, config))
