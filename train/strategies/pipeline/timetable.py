"""Pipeline schedules as tables: what each rank does at which time, a drawing in text, and the bubble.

The tables are torch's own, made without a process group. Times are idealised: a forward (F), a backward to the inputs
(I) and a backward to the weights (W) take one unit each, a whole backward (B) takes two, and sending takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from train.strategies.pipeline.placement import SCHEDULES, rank_of_stage, stages_of_rank

UNITS = {"F": 1, "B": 2, "I": 1, "W": 1}


class Action(NamedTuple):
    """`kind`: F forward, B whole backward, I backward to the inputs, W backward to the weights."""

    kind: str
    stage: int
    microbatch: int


class Paired(Action):
    """The first of two actions that torch runs as one, one after the other (`OVERLAP_F_B`): what both computed is sent
    when both are done. It equals an `Action` with the same fields."""


def units(action: Action) -> float:
    return UNITS[action.kind]


@dataclass(frozen=True)
class Timetable:
    """`rows[rank]`: pairs (start, action) in the order of time. `duration`: an action's time, in the same unit."""

    rows: list[list[tuple[float, Action]]]
    duration: Callable[[Action], float] = units

    @property
    def length(self) -> float:
        return max(start + self.duration(action) for row in self.rows for start, action in row)

    @property
    def bubble(self) -> float:
        """The share of the ranks' time, from the first forward to the last backward, in which they wait."""
        busy = sum(self.duration(action) for row in self.rows for _, action in row)
        return 1 - busy / (self.length * len(self.rows))


def most_actions(schedule: str) -> int:
    """The most actions of all ranks for which a schedule is replayed before a run; this takes about a second."""
    return 200_000 if schedule in ("gpipe", "1f1b") else 20_000


@lru_cache(maxsize=4)
def actions_by_rank(schedule: str, num_stages: int, num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    """The order of each rank's actions. Do not change the result: it is cached."""
    if schedule == "gpipe":
        return [_phases(rank, num_microbatches, num_microbatches) for rank in range(num_ranks)]
    if schedule == "1f1b":
        ahead = [min(num_ranks - rank, num_microbatches) for rank in range(num_ranks)]
        return [_phases(rank, num_microbatches, ahead[rank]) for rank in range(num_ranks)]
    return _torch_actions(schedule, num_stages, num_ranks, num_microbatches)


def _phases(stage: int, num_microbatches: int, ahead: int) -> list[Action]:
    """`ahead` forwards, then one backward and one forward in turn, then the remaining backwards."""
    actions = [Action("F", stage, i) for i in range(ahead)]
    for i in range(num_microbatches):
        actions.append(Action("B", stage, i))
        if ahead + i < num_microbatches:
            actions.append(Action("F", stage, ahead + i))
    return actions


def _torch_actions(schedule: str, num_stages: int, num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    # `pipeline_order` is public, but its actions are not (torch 2.11 to 2.13). It reads only these fields of a stage.
    from torch.distributed.pipelining import schedules

    stage: Any = SimpleNamespace(
        num_stages=num_stages, group_size=num_ranks, group_rank=0, submod=None, stage_index_to_group_rank={}
    )
    made = getattr(schedules, SCHEDULES[schedule].class_name)([stage] * (num_stages // num_ranks), num_microbatches)
    return [
        [
            part
            for action in made.pipeline_order[rank]
            if action is not None
            for part in _one_by_one(action.sub_actions or (action,))
        ]
        for rank in range(num_ranks)
    ]


def _one_by_one(parts: Iterable[Any]) -> list[Action]:
    *before, last = (Action(part.computation_type.value, part.stage_index, part.microbatch_index) for part in parts)
    return [*(Paired(*action) for action in before), last]


def timetable(rows: list[list[Action]], num_stages: int, duration: Callable[[Action], float] = units) -> Timetable:
    """The times at which ranks run their actions: in order, and each as soon as its input exists."""
    done: dict[tuple[str, int, int], float] = {}  # when an action ends
    placed: list[list[tuple[float, Action]]] = [[] for _ in rows]
    free = [0.0] * len(rows)
    ranks = [*range(len(rows))]
    while any(len(row) > len(had) for row, had in zip(rows, placed, strict=True)):
        progressed = False
        ranks.reverse()  # backwards come from the last rank, forwards from the first
        for rank in ranks:
            row = rows[rank]
            while len(placed[rank]) < len(row):
                place = len(placed[rank])
                action = row[place]
                ready = _ready(action, num_stages, done)
                if ready is None:
                    break
                start = max(free[rank], ready)
                placed[rank].append((start, action))
                free[rank] = start + duration(action)
                if not isinstance(action, Paired):
                    done[action] = free[rank]
                if place and isinstance(before := row[place - 1], Paired):
                    done[before] = free[rank]
                progressed = True
        if not progressed:
            raise ValueError("the schedule has a deadlock")
    return Timetable(placed, duration)


def _ready(action: Action, num_stages: int, done: dict[tuple[str, int, int], float]) -> float | None:
    """The time at which the action's input exists; None if it is not known yet."""
    kind, stage, i = action  # plain tuples find actions too, and are made faster
    if kind == "F":
        return 0 if stage == 0 else done.get(("F", stage - 1, i))
    if kind == "W":
        return done.get(("I", stage, i))
    if stage == num_stages - 1:
        return done.get(("F", stage, i))
    ready = done.get(("B", stage + 1, i))
    return done.get(("I", stage + 1, i)) if ready is None else ready


def closed_form_bubble(schedule: str, num_stages: int, num_ranks: int, num_microbatches: int) -> float | None:
    """The bubble by its formula (strategies/pipelined.py). None if the formula does not hold, because there are too few
    microbatches or unequal rounds of them."""
    p, m, v = num_ranks, num_microbatches, num_stages // num_ranks
    facts = SCHEDULES[schedule]
    if m < (2 * p - 1 if facts.v_shaped else p) or (facts.microbatches == "rounds" and m % p):
        return None
    waits = (p - 1) * (2 if facts.in_pairs else 1)
    return waits / ((3 if facts.splits_backward else 1) * v * m + waits)


def draw_schedule(schedule: str, num_stages: int, num_ranks: int, num_microbatches: int) -> str:
    """A drawing with a line for each rank and a column for each unit of time.

    `F3` is the forward of microbatch 3, `B3 --` its backward, which takes two units, and `I3` and `W3` are the two
    halves of the backward. If a rank has several stages, a letter names the stage: `F3a` is on the first, `F3b` on the
    second. A dot means that the rank waits.
    """
    table = timetable(actions_by_rank(schedule, num_stages, num_ranks, num_microbatches), num_stages)
    v_shaped, several = SCHEDULES[schedule].v_shaped, num_stages > num_ranks
    cells = []
    for rank, row in enumerate(table.rows):
        own = stages_of_rank(rank, num_ranks, num_stages, v_shaped=v_shaped)
        line = ["."] * int(table.length)
        for start, (kind, stage, microbatch) in ((int(start), action) for start, action in row):
            line[start] = f"{kind}{microbatch}" + (chr(ord("a") + own.index(stage)) if several else "")
            line[start + 1 : start + UNITS[kind]] = ["--"] * (UNITS[kind] - 1)
        cells.append(line)
    width = max(len(cell) for line in cells for cell in line)
    label = len(f"rank {num_ranks - 1}")
    lines = [
        f"{f'rank {rank}':{label}}  " + " ".join(f"{cell:{width}}" for cell in line).rstrip()
        for rank, line in enumerate(cells)
    ]
    return "\n".join(lines)


class Forward(NamedTuple):
    rank: int
    stage: int
    microbatch: int


def forward_ticks(num_stages: int, num_ranks: int, num_microbatches: int, *, v_shaped: bool) -> list[list[Forward]]:
    """Forwards only, breadth first, in ticks. In a tick each rank runs at most one forward, and the next tick may use
    the results."""
    rows = [
        [Action("F", s, i) for s in stages_of_rank(r, num_ranks, num_stages, v_shaped=v_shaped)
         for i in range(num_microbatches)]
        for r in range(num_ranks)
    ]  # fmt: skip
    table = timetable(rows, num_stages)
    ticks: list[list[Forward]] = [[] for _ in range(int(table.length))]
    for row in table.rows:
        for start, (_, stage, i) in row:
            ticks[int(start)].append(Forward(rank_of_stage(stage, num_ranks, v_shaped=v_shaped), stage, i))
    return ticks
