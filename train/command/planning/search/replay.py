"""The bubble of a pipeline, by the order in which torch's schedule runs every action, with predicted times of stages.

A stage's time is its share of its rank's: by its layers, and the head's on the last one. Messages that are not hidden
lengthen the forward by a third of their time and the backward by two thirds. From MANY rounds on, each further round
of microbatches takes as long as the one before, so that only so many are replayed.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from train.command.planning.constants import Constants
from train.command.planning.links import Network
from train.command.planning.quantities import Quantities
from train.command.planning.step_time import StageTime, StepTime, head_time, layer_time, step_time
from train.strategies.pipeline.placement import SCHEDULES, rank_of_stage
from train.strategies.pipeline.timetable import Action, actions_by_rank, timetable

FEW, MANY = 2, 3  # microbatches per rank of the pipeline
FORWARD = 1 / 3  # the share of the messages of a microbatch that come in its forward
SPLIT = 0.5  # the share of a backward that each of its halves takes, where a schedule splits it


@dataclass
class Replays:
    """Replays of one search. Layouts that differ only in what they send once a step have the same bubble."""

    bubbles: dict[Hashable, float] = field(default_factory=dict)

    def step_time(self, q: Quantities, c: Constants, net: Network | None = None) -> StepTime:
        """The time of a step with the replayed bubble; without a pipeline, as `step_time`."""
        if q.job.plan.degrees["pp"] == 1:
            return step_time(q, c, net=net)
        shares = stage_shares(q, c)

        def bubble(q: Quantities, order: list[StageTime]) -> float:
            times = tuple((one.forward, one.backward, *one.exposed.values()) for one in order)
            key = (shape_of(q), q.microbatches, times, tuple(shares))
            if key not in self.bubbles:
                self.bubbles[key] = _bubble(q, order, shares)
            return self.bubbles[key]

        return step_time(q, c, bubble, net)


def _bubble(q: Quantities, order: list[StageTime], shares: list[float]) -> float:
    ranks, m = len(order), q.microbatches
    slowest = max(one.microbatch for one in order)
    if m <= MANY * ranks:
        length = _length(q, order, shares, m)
    else:
        few, many = (_length(q, order, shares, rounds * ranks) for rounds in (FEW, MANY))
        length = few + (m - FEW * ranks) * (many - few) / ((MANY - FEW) * ranks)
    return max(length - m * slowest, 0.0)


def shape_of(q: Quantities) -> tuple[str, int, int, int]:
    """(Schedule, stages, ranks, microbatches) of the largest replay."""
    plan = q.job.plan
    ranks = plan.degrees["pp"]
    return plan.config.strategy.schedule_name() or "", plan.num_stages, ranks, min(q.microbatches, MANY * ranks)


def stage_shares(q: Quantities, c: Constants) -> list[float]:
    """The share of each stage in the time of its rank."""
    plan = q.job.plan
    forward, backward = layer_time(q, c)
    layer, head = forward.total + backward.total, head_time(q, c, 0) + head_time(q, c, 1)
    times = [layer * count for count in plan.layers_per_stage]
    times[-1] += head
    ranks = [_rank(q, stage) for stage in range(plan.num_stages)]
    return [time / sum(other for other, of in zip(times, ranks, strict=True) if of == rank)
            for time, rank in zip(times, ranks, strict=True)]  # fmt: skip


def _rank(q: Quantities, stage: int) -> int:
    name, _, ranks, _ = shape_of(q)
    return rank_of_stage(stage, ranks, v_shaped=SCHEDULES[name].v_shaped)


def _length(q: Quantities, order: list[StageTime], shares: list[float], microbatches: int) -> float:
    name, stages, ranks, _ = shape_of(q)
    durations: dict[tuple[str, int], float] = {}
    for stage in range(stages):
        one, share = order[_rank(q, stage)], shares[stage]
        exposed = sum(one.exposed.values())
        forward, backward = one.forward + FORWARD * exposed, one.backward + (1 - FORWARD) * exposed
        durations["F", stage], durations["B", stage] = share * forward, share * backward
        durations["I", stage] = durations["W", stage] = SPLIT * share * backward

    def duration(action: Action) -> float:
        return durations[action[0], action[1]]

    return timetable(actions_by_rank(name, stages, ranks, microbatches), stages, duration).length
