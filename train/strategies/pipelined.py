"""Pipeline parallelism: consecutive layers on consecutive ranks of `pp`; `spmd.py`'s techniques apply to each stage.

    rank 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3           GPipe: all forwards, then all backwards
    rank 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .            (`pipeline/timetable.py: draw_schedule` draws any)

With p ranks, m microbatches and v stages a rank, the bubble, as the share of the step in which a rank waits, is:

    gpipe                    (p-1)/(m+p-1)    GPipe (Huang et al. 2019)
    1f1b                     (p-1)/(m+p-1)    PipeDream-Flush (Narayanan et al. 2021a): at most p microbatches alive
    interleaved_1f1b         (p-1)/(vm+p-1)   Megatron-LM's (Narayanan et al. 2021b): depth first
    looped_bfs               (p-1)/(vm+p-1)   breadth first (Lamy-Poirier 2022): all microbatches of a stage at once
    interleaved_zero_bubble  (p-1)/(3vm+p-1)  ZB1P (Qi et al. 2023), interleaved: gradients of weights fill the end
    zbv_zero_bubble          (p-1)/(6m+p-1)   ZB-V (Qi et al. 2023, section 6): stages placed as a V; m >= 2p-1
    dualpipev                (p-1)/(6m+p-1)   DualPipeV: DualPipe (DeepSeek-AI 2024) cut in half, a V; m >= 2p

for a forward and the two halves of a backward of equal length; in the last three what is left is the p-1 units by which
ranks start one after the other. Tests hold these forms against torch's own tables.

Sent per step: 2h x microbatches x (B x T x D) elements, activations forward and their gradients back, over the h hops
from stage to stage that change rank: pv-1 of a loop (p > 1), 2(p-1) of a V, whose turn stays on a rank.
A tied embedding is held by the first and the last stage: one exchange of its gradient per step (none within a rank).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config.fields import key, number
from train.config.strategy import TrainStep
from train.strategies.pipeline.keys import PipelineKeys
from train.strategies.spmd import Spmd

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config
    from train.model.transformer import Transformer


@dataclass
class Pipeline(PipelineKeys, Spmd):
    zero_stage: int = number(
        1, "ZeRO's stage within a step; a schedule gathers and reduces once a step: 1.", ge=1, lt=4
    )
    reshard_after_forward: bool = key(
        False, "Whether a block's gathered parameters are freed after its forward, and gathered again when needed."
    )

    def frees_parameters(self) -> bool:
        return self.uses_fsdp() and self.reshard_after_forward

    def reduces_once(self) -> bool:
        """torch's schedules gather and reduce once a step."""
        return self.uses_fsdp()

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step
        from train.strategies.apply import apply_techniques
        from train.strategies.pipeline.stages import build_stages, pipelined
        from train.strategies.pipeline.tied import tie_stages

        stages = build_stages(model, mesh, config, self, apply_techniques)
        tied = tie_stages(stages, model, mesh["pp"])
        return Step(model, mesh, config, *pipelined(stages, tied, mesh, config, self), tied.shared)
