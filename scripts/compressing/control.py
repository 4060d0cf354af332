"""One compression from its command line on, with the parent trained on as its control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from scripts.compressing.making import Making
from scripts.compressing.opened import open_model
from scripts.compressing.record import Record, is_compressed
from scripts.compressing.words import DISTIL, TRAINED_ON, Task, directory
from train.checkpoint.folder import CHECKPOINTS
from train.checkpoint.whole.trained import Opened
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem


def compress(task: Task) -> tuple[Path, Record]:
    """Do the task, and give the new directory and its record. Call it from the main thread. Raises BadInput and other
    errors that are `Reported`."""
    check_device(task.device)
    making = making_of(task, open_model(task.run))
    making.check()
    if is_compressed(making.out):
        message = f"{making.out} exists already"
        raise BadInput(Problem("exists", message, "remove it, or use out=FOLDER with another folder"))
    training = making.training()
    if training is not None:
        training.check()
    control = control_of(making)
    making.prepare()
    run = None if training is None else training.run()
    return making.out, making.finish(run, control)


def check_device(name: str) -> None:
    """Raise BadInput (exit code 3) if this machine does not have the device."""
    if name == "cuda" and not torch.cuda.is_available():
        message = f"device={name}, but torch finds no such device here"
        raise BadInput(Problem("device", message, "use device=cpu", exit_code=EXIT_ENVIRONMENT))


def making_of(task: Task, parent: Opened) -> Making:
    run = parent.folder.parent.parent if parent.folder.parent.name == CHECKPOINTS else parent.folder
    return Making(task, parent, directory(task, run))


def needs_control(task: Task) -> bool:
    """Whether the method trains the parent on, so that it is compared with the parent trained on without it."""
    return task.steps > 0 and task.method not in (DISTIL, TRAINED_ON)


def control_of(making: Making) -> float | None:
    """The loss of the parent, trained on by as many steps with the same words. It is trained once, in a directory of
    its own. Raises BadInput if that directory has another parent."""
    if not needs_control(making.task):
        return None
    task = replace(making.task, method=TRAINED_ON, options={"retrain": making.task.steps}, out=None)
    other = making_of(task, making.parent)
    if not is_compressed(other.out):
        print(f"first the parent is trained on by as many steps, to compare with: {other.out}", flush=True)
        return compress(task)[1].after.loss
    record = Record.read(other.out)
    if record.parent.get("sha256") != making.parent.sha256:
        message = f"{other.out} was made of another state of {making.task.run}"
        raise BadInput(Problem("control", message, "remove it, so that it is made again"))
    return record.after.loss
