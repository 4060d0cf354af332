"""Pipeline parallelism: consecutive layers on consecutive ranks of `pp`; `spmd.py`'s techniques apply to each stage.

    rank 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3           GPipe: all forwards, then all backwards
    rank 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .            (`pipeline/timetable.py: draw_schedule` draws every schedule)

The bubble is the share of the step in which a rank waits. With p ranks, m microbatches and v stages per rank it is:

    gpipe                    (p-1)/(m+p-1)    GPipe (Huang et al. 2019)
    1f1b                     (p-1)/(m+p-1)    PipeDream-Flush (Narayanan et al. 2021a): at most p microbatches alive
    interleaved_1f1b         (p-1)/(vm+p-1)   Megatron-LM (Narayanan et al. 2021b): depth first
    looped_bfs               (p-1)/(vm+p-1)   breadth first (Lamy-Poirier 2022): all microbatches of a stage at once
    interleaved_zero_bubble  (p-1)/(3vm+p-1)  ZB1P (Qi et al. 2023), interleaved: weight gradients fill the bubble
    zbv_zero_bubble          (p-1)/(6m+p-1)   ZB-V (Qi et al. 2023, section 6): stages in a V; m >= 2p-1
    dualpipev                (p-1)/(3m+p-1)   DualPipeV: one half of DualPipe (DeepSeek-AI 2024), in a V; m >= 2p

This holds if a forward and each half of a backward take the same time. In the two zero-bubble schedules only the p-1
units of time remain by which the ranks start one after the other. DualPipeV pairs forwards with backwards, which are
meant to run at the same time; torch runs one after the other and sends the results of both at the end, so that twice as
many units remain. Tests compare these formulas with torch's own tables.

Sent per step: 2h x microbatches x (B x T x D) elements, activations forward and their gradients backward. h is the
number of steps from stage to stage that change the rank: pv-1 in a loop (p > 1), and 2(p-1) in a V, which turns without
changing the rank. If the embedding is tied, the first and the last stage hold it: they exchange its gradient once per
step, unless they are on the same rank.
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
        1, "ZeRO's stage within a step. It must be 1: a schedule gathers and reduces once per step.", ge=1, lt=4
    )
    reshard_after_forward: bool = key(
        False, "Whether a block's gathered parameters are freed after its forward, and gathered again when needed."
    )

    def frees_parameters(self) -> bool:
        return self.uses_fsdp() and self.reshard_after_forward

    def reduces_once(self) -> bool:
        """Always with FSDP, because torch's schedules gather and reduce once per step."""
        return self.uses_fsdp()

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step
        from train.strategies.apply import apply_techniques
        from train.strategies.pipeline.stages import build_stages, pipelined
        from train.strategies.pipeline.tied import tie_stages

        stages = build_stages(model, mesh, config, self, apply_techniques)
        tied = tie_stages(stages, model, mesh["pp"])
        run = pipelined(stages, tied, mesh, config, self)
        return Step(model, mesh, config, *run, tied.shared, [*stages.wrapped.values()])
