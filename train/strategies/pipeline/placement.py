"""What each schedule needs, which rank runs which stage, and which layers a stage has. Torch is not imported.

loop   stage s is on rank s % p         rank 0: 0 4    rank 1: 1 5    rank 2: 2 6    rank 3: 3 7
V      first up, then down the ranks    rank 0: 0 7    rank 1: 1 6    rank 2: 2 5    rank 3: 3 4
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from train.config.flops import flops_per_token

if TYPE_CHECKING:
    from train.config.schema import ModelConfig


@dataclass(frozen=True)
class ScheduleFacts:
    """`class_name`: the class in torch.distributed.pipelining. `least`, `most`: the smallest number of stages per rank,
    which is the default, and the largest."""

    class_name: str
    least: int = 2
    most: int | None = None
    v_shaped: bool = False
    splits_backward: bool = False  # whether the weights' gradients are computed apart, to fill the bubble with them
    in_pairs: bool = False  # whether a forward and a backward run as one action (`timetable.Paired`)
    microbatches: str = "any"  # "any" | "stages": at least as many as stages | "rounds": equal rounds of about p

    def accepts(self, num_microbatches: int, num_ranks: int, num_stages: int) -> bool:
        if self.microbatches == "stages":
            return num_microbatches >= num_stages
        if self.microbatches == "rounds":
            return num_microbatches % max(num_microbatches // num_ranks, 1) == 0
        return num_microbatches >= 1


SCHEDULES: dict[str, ScheduleFacts] = {
    "gpipe": ScheduleFacts("ScheduleGPipe", least=1, most=1),
    "1f1b": ScheduleFacts("Schedule1F1B", least=1, most=1, microbatches="stages"),
    "interleaved_1f1b": ScheduleFacts("ScheduleInterleaved1F1B", microbatches="rounds"),
    "looped_bfs": ScheduleFacts("ScheduleLoopedBFS"),
    "interleaved_zero_bubble": ScheduleFacts(
        "ScheduleInterleavedZeroBubble", splits_backward=True, microbatches="rounds"
    ),
    "zbv_zero_bubble": ScheduleFacts("ScheduleZBVZeroBubble", most=2, v_shaped=True, splits_backward=True),
    "dualpipev": ScheduleFacts(
        "ScheduleDualPipeV", most=2, v_shaped=True, splits_backward=True, in_pairs=True, microbatches="stages"
    ),
}


def rank_of_stage(stage: int, num_ranks: int, *, v_shaped: bool) -> int:
    lap, place = divmod(stage, num_ranks)
    return num_ranks - 1 - place if v_shaped and lap % 2 else place


def stages_of_rank(rank: int, num_ranks: int, num_stages: int, *, v_shaped: bool) -> list[int]:
    laps = range(num_stages // num_ranks)
    return [lap * num_ranks + (num_ranks - 1 - rank if v_shaped and lap % 2 else rank) for lap in laps]


def layers_per_stage(model: ModelConfig, seq_len: int, num_stages: int) -> list[int]:
    """How many layers each stage holds, so that the stage with the most FLOPs has as few as possible.

    The head counts with its FLOPs on the last stage; the embedding is a look-up and counts nothing. Among splits that
    are equally good, it is the most even one, and the first stages get one layer more if the number does not divide.
    Every stage needs a layer: `num_layers` must be at least `num_stages`.
    """
    if num_stages == 1:
        return [model.num_layers]
    head = flops_per_token(dataclasses.replace(model, num_layers=0), seq_len)
    layer = flops_per_token(dataclasses.replace(model, num_layers=1), seq_len) - head

    def cost(last: int) -> tuple[float, float]:
        """(The most FLOPs of a stage, the sum of their squares), if the last stage has `last` layers."""
        base, extra = divmod(model.num_layers - last, num_stages - 1)
        flops, end = (base * layer, (base + 1) * layer), last * layer + head
        squares = (num_stages - 1 - extra) * flops[0] ** 2 + extra * flops[1] ** 2
        return max(flops[extra > 0], end), squares + end**2

    last = min(range(1, model.num_layers - num_stages + 2), key=cost)
    base, extra = divmod(model.num_layers - last, num_stages - 1)
    return [base + (i < extra) for i in range(num_stages - 1)] + [last]


def layers_of_stages(counts: list[int]) -> list[range]:
    """The layers of each stage, consecutive: [3, 3, 2] gives 0–2, 3–5, 6–7."""
    starts = itertools.accumulate(counts, initial=0)
    return [range(start, start + count) for start, count in zip(starts, counts, strict=False)]
