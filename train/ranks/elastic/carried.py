"""What ranks carry from one generation into the next, in memory.

In data parallelism every rank has the whole state. All collectives of a step come before its update, so that a rank has
made the update of a step either wholly or not at all; and no rank can be more than one step ahead of another, as it
would have needed the other's gradients. So the newest step of the survivors is complete on at least one of them, and is
sent to those that have an older one, and to new ones, which have none.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.config.strategy import SavesState, StepResult
from train.ranks.side_group import SideGroup
from train.ranks.state import Piece

KEPT = 2  # steps whose results may not be written yet, because they are logged one step late


@dataclass
class Made:
    """What a step computed."""

    loss: float
    grad_norm: float
    lr: float
    extras: dict[str, float]


@dataclass
class Carried:
    """`step`: the last step whose update this state has. `report`: what rank 0 needs to go on with the report of the
    run (`Report.memo`). `made`: the results of the last steps. `tensors`: the state, by the keys of a checkpoint; empty
    while a train step has it."""

    step: int
    report: dict[str, Any]
    made: dict[int, Made] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, step: int, result: StepResult, lr: float) -> None:
        """The update of this step has been made. It waits for the device."""
        extras = {tag: value.item() for tag, value in result.extras.items()}
        self.step = step
        self.made[step] = Made(result.loss.item(), result.grad_norm.item(), lr, extras)
        self.made.pop(step - KEPT, None)


def newest(carried: Carried | None, side_group: SideGroup) -> Carried:
    """What rank 0 carries, who has the newest step, on every rank. A rank with this step has its own tensors, which are
    the same, and other ranks have none. Collective."""
    mine = None if carried is None else [carried.step, carried.report, [*map(_plain, carried.made.items())]]
    step, report, made = side_group.share_json(mine)
    tensors = carried.tensors if carried is not None and carried.step == step else {}
    return Carried(step, report, {number: Made(**values) for number, values in made}, tensors)


def restore(
    train_step: SavesState, carried: Carried, side_group: SideGroup, device: torch.device, *, sends: bool
) -> None:
    """Fill the state of a step that was just built. `sends`: whether any rank has no tensors, so that all get those of
    rank 0. Collective."""

    def read(pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.key in carried.tensors:
                piece.tensor.copy_(carried.tensors[piece.key])
            if sends:
                sent = piece.tensor.to(device)
                dist.broadcast(sent, 0)
                piece.tensor.copy_(sent)

    train_step.restore(read, side_group.share_json([*carried.tensors]))


def _plain(made: tuple[int, Made]) -> tuple[int, dict[str, Any]]:
    return made[0], asdict(made[1])
