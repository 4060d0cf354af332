"""Pipeline parallelism: consecutive layers on consecutive ranks of `pp`; `spmd.py`'s techniques apply to each stage.

    rank 0   F0 F1 F2 F3 .  .  B0 B1 B2 B3           GPipe: all forwards, then all backwards
    rank 1   .  F0 F1 F2 F3 B0 B1 B2 B3 .            (`timetable.draw_schedule` draws any schedule)

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

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from train.config.fields import MAX_LAYERS, number
from train.config.strategy import Order, TrainStep
from train.strategies.pipeline.placement import (
    SCHEDULES,
    ScheduleFacts,
    layers_of_stages,
    layers_per_stage,
    stages_of_rank,
)
from train.strategies.pipeline.timetable import actions_by_rank, closed_form_bubble
from train.strategies.spmd import Spmd

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from train.config.schema import Config, ModelConfig
    from train.model.transformer import Transformer


@dataclass
class Pipeline(Spmd):
    pp: int | None = None
    schedule: str = "1f1b"  # see above
    stages_per_rank: int | None = number(None, le=MAX_LAYERS)  # null: 1 for gpipe and 1f1b, 2 for the others
    layers_per_stage: list[int] = field(default_factory=list)  # [3, 3, 2]; empty: balanced by FLOPs
    zero_stage: int = number(1, ge=1, lt=4)  # torch's schedules gather and reduce once a step
    reshard_after_forward: bool = False

    def facts(self) -> ScheduleFacts:
        """Of the schedule; an unknown one, which a rule refuses, passes for the simplest."""
        return SCHEDULES.get(self.schedule, SCHEDULES["gpipe"])

    def frees_parameters(self) -> bool:
        return self.reshard_after_forward

    def splits_backward(self) -> bool:
        return self.facts().splits_backward

    def stages_of(self, rank: int, num_ranks: int) -> list[int]:
        """The stages of a rank of `pp`, first to last."""
        return stages_of_rank(rank, num_ranks, num_ranks * self.num_chunks(), v_shaped=self.facts().v_shaped)

    def layers_of(self, model: ModelConfig, seq_len: int, num_ranks: int) -> list[range]:
        """The layers of every stage."""
        counts = self.layers_per_stage or layers_per_stage(model, seq_len, num_ranks * self.num_chunks())
        return layers_of_stages(counts)

    def num_chunks(self) -> int:
        """Stages per rank."""
        return self.facts().least if self.stages_per_rank is None else self.stages_per_rank

    def order(self, num_ranks: int, num_microbatches: int) -> Order | None:
        shape = (self.schedule, num_ranks * self.num_chunks(), num_ranks, num_microbatches)
        return Order(actions_by_rank(*shape), shape[1], closed_form_bubble(*shape))

    def build(self, model: Transformer, mesh: DeviceMesh, config: Config) -> TrainStep:
        from train.step import Step
        from train.strategies.pipeline.stages import build_stages, pipelined
        from train.strategies.pipeline.tied import tie_stages

        stages = build_stages(model, mesh, config)
        tied = tie_stages(stages, model, mesh["pp"])
        return Step(model, mesh, config, *pipelined(stages, tied, mesh, config), tied.shared)
