"""The state that ranks carry from one generation into the next, in memory.

In data parallelism every rank has the whole state. All collectives of a step come before its update, so that a rank has
made the update of a step either wholly or not at all; and no rank can be more than one step ahead of another, as it
would have needed the other's gradients. So the newest step of the survivors is complete on at least one of them, and is
sent to those that have an older one, and to new ones, which have none.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.ranks.side_group import SideGroup

if TYPE_CHECKING:
    from train.step import Step

Figures = dict[str, float]
KEPT_FIGURES = 2  # steps whose figures may not be written yet, because they are logged one step late


@dataclass
class Carried:
    """`step`: the last step whose update this state has; 0 if it has none. `run`: the run's directory. `first_step_s`:
    the time from the start to the first step. `figures`: the results of the last steps, by step and tag. `tensors`:
    parameters, buffers and the optimiser's state, by name."""

    step: int = 0
    run: Path | None = None
    first_step_s: float = 0.0
    figures: dict[int, Figures] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def note_first(self, step: int, loss: Tensor, started: float) -> None:
        """Note how long it took until the first step was complete. It waits for the device, once."""
        if step == 1:
            loss.item()
            self.first_step_s = time.perf_counter() - started

    def made(self, step: int, figures: Figures) -> None:
        """The update of this step has been made."""
        self.step = step
        self.figures[step] = figures
        self.figures.pop(step - KEPT_FIGURES, None)


def tensors_of(train_step: Step) -> dict[str, Tensor]:
    """What a rank of data parallelism holds between steps, under a name for each tensor. Nothing is copied."""
    model = {f"parameter {name}": p.detach() for name, p in train_step.parameters.items()}
    model |= {f"buffer {name}": buffer for name, buffer in train_step.model.named_buffers()}
    return model | {
        f"{kind} {name}": value
        for name, shard in train_step.optimiser.shards.items()
        for kind, value in train_step.optimiser.inner.state.get(shard, {}).items()
        if isinstance(value, Tensor)
    }


@torch.no_grad()
def put_into(train_step: Step, tensors: dict[str, Tensor]) -> None:
    """Give a step that was just built the state that `tensors_of` another one returned."""
    own = tensors_of(train_step)
    for name, value in tensors.items():
        if name in own:
            own[name].copy_(value)
    for name, shard in train_step.optimiser.shards.items():
        kept = {kind: value for kind, of, value in _split(tensors) if of == name and f"{kind} {of}" not in own}
        if kept:
            train_step.optimiser.inner.state[shard] = kept


def equalised(carried: Carried, side_group: SideGroup, device: torch.device, *, sends: bool) -> Carried:
    """The state of rank 0, which has the newest step, on every rank. `sends`: whether a rank lacks this step; the
    others then keep their tensors, which are equal to the received ones. Collective over the world."""
    mine = {
        "step": carried.step,
        "run": None if carried.run is None else str(carried.run),
        "first_step_s": carried.first_step_s,
        "figures": list(carried.figures.items()),
        "tensors": [[name, list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in carried.tensors.items()],
    }
    newest: dict[str, Any] = json.loads(side_group.share(json.dumps(mine)))
    run = None if newest["run"] is None else Path(newest["run"])
    if not sends:
        return carried
    tensors = {}
    for name, shape, dtype in newest["tensors"]:
        value = carried.tensors.get(name) if carried.step == newest["step"] else None
        tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype), device=device) if value is None else value
        dist.broadcast(tensors[name], 0)
    return Carried(newest["step"], run, newest["first_step_s"], dict(newest["figures"]), tensors)


def _split(tensors: dict[str, Tensor]) -> list[tuple[str, str, Tensor]]:
    """(kind, the parameter's or buffer's name, value) of every tensor."""
    return [(*name.split(" ", 1), value) for name, value in tensors.items()]  # type: ignore[misc]
