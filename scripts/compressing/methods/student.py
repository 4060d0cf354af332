"""A student for distillation: the teacher with half its layers. Torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from train.config.problems import BadInput, Problem

T = TypeVar("T")


def student_layers(teacher_layers: int) -> int:
    """The number of the student's layers. Raises BadInput if the teacher has only one."""
    if teacher_layers < 2:
        message = f"method=distil makes a student of half the layers, but model.num_layers={teacher_layers}"
        raise BadInput(Problem("layers", message, "distil a run with model.num_layers=2 or more"))
    return teacher_layers // 2


def even_layers(tensors: Mapping[str, T], teacher_layers: int) -> dict[str, T]:
    """The student's tensors by global name: layer i is layer 2 i of the teacher, and the rest is the teacher's."""
    found = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            found[name] = tensor
            continue
        _, number, rest = name.split(".", 2)
        layer, odd = divmod(int(number), 2)
        if not odd and layer < student_layers(teacher_layers):
            found[f"layers.{layer}.{rest}"] = tensor
    return found
