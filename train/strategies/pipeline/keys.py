"""The keys of pipeline parallelism under `strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import MAX_LAYERS, key, number
from train.config.schema import ModelConfig
from train.config.strategy import Order, Strategy
from train.strategies.pipeline.placement import (
    SCHEDULES,
    ScheduleFacts,
    layers_of_stages,
    layers_per_stage,
    stages_of_rank,
)
from train.strategies.pipeline.timetable import actions_by_rank, closed_form_bubble


@dataclass
class PipelineKeys(Strategy):
    pp: int | None = key(None, "The degree of pipeline parallelism: ranks that hold consecutive layers.")
    schedule: str = key(
        "1f1b", "The order in which a rank runs the forwards and backwards of microbatches.", choices=tuple(SCHEDULES)
    )
    stages_per_rank: int | None = number(
        None,
        "Stages that each rank holds; null means 1 for gpipe and 1f1b, and 2 for others.",
        le=MAX_LAYERS,
    )
    layers_per_stage: list[int] = key(list, "The layers of each stage, as [3,3,2]; empty means balanced by FLOPs.")

    def facts(self) -> ScheduleFacts:
        """The facts of the schedule. For an unknown schedule, which a rule refuses, they are those of the simplest."""
        return SCHEDULES.get(self.schedule, SCHEDULES["gpipe"])

    def schedule_name(self) -> str | None:
        return self.schedule

    def splits_backward(self) -> bool:
        return self.facts().splits_backward

    def stages_of(self, rank: int, num_ranks: int) -> list[int]:
        return stages_of_rank(rank, num_ranks, num_ranks * self.num_chunks(), v_shaped=self.facts().v_shaped)

    def layers_of(self, model: ModelConfig, seq_len: int, num_ranks: int) -> list[range]:
        counts = self.layers_per_stage or layers_per_stage(model, seq_len, num_ranks * self.num_chunks())
        return layers_of_stages(counts)

    def num_chunks(self) -> int:
        return self.facts().least if self.stages_per_rank is None else self.stages_per_rank

    def order(self, num_ranks: int, num_microbatches: int) -> Order | None:
        shape = (self.schedule, num_ranks * self.num_chunks(), num_ranks, num_microbatches)
        return Order(actions_by_rank(*shape), shape[1], closed_form_bubble(*shape))
