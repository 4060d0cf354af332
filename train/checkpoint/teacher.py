"""Gives a student its teacher (`train.teacher`): a trained model, to which the student's strategy is applied too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch.distributed.device_mesh import DeviceMesh

from train.checkpoint.reading import read_pieces
from train.checkpoint.whole.trained import Trained, open_trained
from train.command import cli
from train.config.problems import BadInput, Problem
from train.config.schema import Config, TrainConfig
from train.config.strategy import TrainStep
from train.model.transformer import Transformer, dtypes
from train.model.weights import global_parameters
from train.ranks.side_group import SideGroup
from train.ranks.state import pieces_of
from train.strategies.apply import apply_techniques
from train.strategies.data.apply import Replica
from train.strategies.distil.apply import Distilled, Teacher

FIX = "use train.teacher=RUN, the directory of a run, or one of its checkpoints/step-N"


def find_teacher(config: Config, side_group: SideGroup) -> Trained | None:
    """The trained model that `train.teacher` names, which rank 0 verifies; None without one. Collective. Raises
    BadInput, on rank 0 alone if it cannot be opened."""
    if config.train.teacher is None:
        return None
    # an error ends rank 0, and torchrun ends the others
    opened = open_teacher(config) if side_group.world.rank == 0 else None
    folder = side_group.share_json(None if opened is None else str(opened.folder))
    return opened or open_trained(Path(folder))


def open_teacher(config: Config) -> Trained | None:
    """The trained model that `train.teacher` names; None without one. Raises BadInput if there is none, or if it has
    other tokens than the student."""
    path = config.train.teacher
    if path is None:
        return None
    try:
        teacher = open_trained(Path(path).expanduser())
    except BadInput as error:
        said = "; ".join(problem.message for problem in error.problems)
        raise BadInput(Problem("teacher", f"train.teacher={path} cannot be used: {said}", FIX)) from error
    here, there = config.model.vocab_size, teacher.config.model.vocab_size
    if here != there:
        message = f"train.teacher={path} has a vocabulary of {there} tokens, but model.vocab_size={here}"
        raise BadInput(Problem("teacher", message, f"use model.vocab_size={there}, or another teacher"))
    return teacher


def without_options(train: TrainConfig) -> TrainConfig:
    """The keys of a run that only trains on its text."""
    default = TrainConfig()
    names = ("teacher", "distil_weight", "distil_temperature", "qat", "keep_zeros")
    return replace(train, **{name: getattr(default, name) for name in names})


def teach(train_step: TrainStep, teacher: Trained, mesh: DeviceMesh, config: Config) -> None:
    """Build the teacher on the mesh of the student, fill in its parameters, each rank its own part, and give it to the
    student's loss. Collective. Raises BadInput if the strategy cannot split the teacher, and Damaged."""
    own = replace(config, model=teacher.config.model, train=without_options(config.train))
    if problems := cli.problems(own, mesh.size()):
        said = "; ".join(problem.message for problem in problems)
        message = f"train.teacher={config.train.teacher} cannot run as this run does: with the teacher's model, {said}"
        raise BadInput(Problem("teacher", message, "use other values for this run, or another teacher"))
    model = Transformer(own.model, **dtypes(config.precision))
    wrapped = apply_techniques(model, mesh, own)
    pieces = pieces_of(global_parameters(model, own.model), model)
    read_pieces(pieces, teacher.folder, teacher.manifest)
    loss = train_step.model.loss  # type: ignore[attr-defined]
    assert isinstance(loss, Distilled)
    loss.teacher = Teacher(model if isinstance(wrapped, Replica) else wrapped)  # no gradients to reduce
