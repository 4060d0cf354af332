"""Pipeline parallelism: consecutive layers on consecutive ranks of `pp`; `spmd.py`'s techniques apply to each stage.

    rank 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3           GPipe: all forwards, then all backwards
    rank 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .            (`timetable.draw_schedule` draws any schedule)

With p ranks, m microbatches and v stages a rank, the bubble, as the share of the step in which a rank waits, is:

| `schedule`                | technique                                                                   | bubble         |
|---------------------------|-----------------------------------------------------------------------------|----------------|
| `gpipe`                   | GPipe (Huang et al. 2019)                                                   | (p-1)/(m+p-1)  |
| `1f1b`                    | PipeDream-Flush (Narayanan et al. 2021a): at most p microbatches alive      | (p-1)/(m+p-1)  |
| `interleaved_1f1b`        | Megatron-LM's interleaved 1F1B (Narayanan et al. 2021b): depth first        | (p-1)/(vm+p-1) |
| `looped_bfs`              | breadth-first pipelines (Lamy-Poirier 2022): a stage's microbatches at once | (p-1)/(vm+p-1) |
| `interleaved_zero_bubble` | ZB1P / ZB-H1 (Qi et al. 2023), interleaved: weight gradients fill the end   | (p-1)/(3vm+p-1)|
| `zbv_zero_bubble`         | ZB-V (Qi et al. 2023, section 6): stages placed as a V, m >= 2p-1           | (p-1)/(6m+p-1) |
| `dualpipev`               | DualPipeV (DeepSeek-AI 2024, cut in half by Sea AI Lab 2025), m >= 2p       | (p-1)/(6m+p-1) |

for a forward and the two halves of a backward of equal length; in the last three what is left is the p-1 units by which
ranks start one after the other. Tests hold these forms against torch's own tables.

Sent per step: 2h x microbatches x (B x T x D) elements, activations forward and their gradients back, over the h hops
from stage to stage that change rank: pv-1 of a loop (p > 1), 2(p-1) of a V, whose turn stays on a rank.
A tied embedding is held by the first and the last stage: one exchange of its gradient per step (none within a rank).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from train.strategies.base import TrainStep
from train.strategies.placement import SCHEDULES
from train.strategies.spmd import Spmd

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config import Config
    from train.model import Transformer


@dataclass
class Pipeline(Spmd):
    pp: int | None = None
    schedule: str = "1f1b"  # see above
    stages_per_rank: int | None = None  # null: 1 for gpipe and 1f1b, 2 for the others
    layers_per_stage: list[int] = field(default_factory=list)  # [3, 3, 2]; empty: balanced by FLOPs
    reshard_after_forward: bool = False  # else every microbatch would gather the stage's parameters again

    def num_chunks(self) -> int:
        """Stages per rank. An unknown schedule, which a rule refuses, has one."""
        if self.stages_per_rank is not None:
            return self.stages_per_rank
        return SCHEDULES[self.schedule].least if self.schedule in SCHEDULES else 1

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step
        from train.strategies.stages import build_stages, pipelined
        from train.strategies.tied import tie_stages

        stages = build_stages(model, mesh, config)
        tied = tie_stages(stages, mesh["pp"])
        return Step(model, mesh, config, *pipelined(stages, tied, mesh, config), tied.shared)
