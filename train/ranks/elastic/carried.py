"""What ranks carry from one generation into the next, in memory.

All collectives of a step come before its update, so that a rank has made the update of a step either wholly or not at
all; and no rank can be more than one step ahead of another, as it would have needed the other's gradients. So the
newest step of the survivors is complete on at least one of them.

In data parallelism every rank has the whole state, so the newest one is sent to those that have an older one, and to
new ones, which have none. Where ranks hold parts of the state, all holders of one part may lack an update that holders
of another part have made. So there the last collective before the update is a *vote*: a rank has entered it when its
gradients are complete, and has passed it when those of all ranks are. If any rank has made the update, all have entered
the vote, so that those which have not passed it can make the update too, from the gradients that they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.strategy import SavesState, StepResult
from train.ranks.distributed import own_device
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


@runtime_checkable
class GoesOn(SavesState, Protocol):
    """What a step needs so that a run can go on without lost ranks. `before_update` is called when the step has sent
    everything, before it changes the state, with the function that makes the change."""

    before_update: Callable[[Callable[[], StepResult]], None] | None


@dataclass(frozen=True)
class Late:
    """The update of the next step, whose vote this rank has entered and not passed. `change` makes it in the state of
    `train_step`; nothing is sent."""

    train_step: SavesState
    change: Callable[[], StepResult]
    lr: float


@dataclass
class Carried:
    """`step`: the last step whose update this state has. `report`: what rank 0 needs to go on with the report of the
    run (`Report.memo`). `made`: the results of the last steps. `tensors`: the state, by the keys of a checkpoint; empty
    while a train step has it."""

    step: int
    report: dict[str, Any]
    made: dict[int, Made] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unread: dict[int, tuple[StepResult, float]] = field(default_factory=dict)  # results of steps, still on the device
    late: Late | None = None

    def add(self, step: int, result: StepResult, lr: float) -> None:
        """The update of this step has been made."""
        self.step = step
        self.unread[step] = (result, lr)
        for results in (self.made, self.unread):
            results.pop(step - KEPT, None)

    def keep(self, train_step: SavesState) -> None:
        """Take over the state of a step whose generation is over. It waits for the device."""
        self.tensors = {piece.key: piece.tensor for piece in train_step.saved()}
        for step, (result, lr) in self.unread.items():
            extras = {tag: value.item() for tag, value in result.extras.items()}
            self.made[step] = Made(result.loss.item(), result.grad_norm.item(), lr, extras)
        self.unread.clear()

    def catch_up(self) -> None:
        """Make the update that other ranks have made."""
        assert self.late is not None, "a rank that is behind has entered the vote"
        late, self.late = self.late, None
        self.add(self.step + 1, late.change(), late.lr)
        self.keep(late.train_step)


def newest(carried: Carried | None, side_group: SideGroup) -> Carried:
    """What rank 0 carries, who has the newest step, on every rank. A rank with this step has its own tensors, which are
    the same, and other ranks have none. Collective."""
    mine = None if carried is None else [carried.step, carried.report, [*map(_plain, carried.made.items())]]
    step, report, made = side_group.share_json(mine)
    tensors = carried.tensors if carried is not None and carried.step == step else {}
    return Carried(step, report, {number: Made(**values) for number, values in made}, tensors)


def restore(train_step: SavesState, carried: Carried, side_group: SideGroup, mesh: DeviceMesh, *, sends: bool) -> None:
    """Fill the state of a step that was just built. `sends`: whether any rank has no tensors, so that each gets those
    of the first rank with the same part of the state: the ranks along `dp_replicate` have copies. Collective."""
    device, copies = own_device(mesh), mesh["dp_replicate"].get_group()

    def read(pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.key in carried.tensors:
                piece.tensor.copy_(carried.tensors[piece.key])
            if sends:
                sent = piece.tensor.to(device)
                dist.broadcast(sent, group=copies, group_src=0)
                piece.tensor.copy_(sent)

    train_step.restore(read, side_group.share_json([*carried.tensors]))


def _plain(made: tuple[int, Made]) -> tuple[int, dict[str, Any]]:
    return made[0], asdict(made[1])
