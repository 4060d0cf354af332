"""Distillation (Hinton et al. 2015): the student learns the teacher's probabilities of the next token beside the text.

    loss = (1 - w) x cross-entropy + w x T^2 x KL(teacher || student at temperature T), per valid token

The teacher computes the same tokens on the same ranks, before the student does, without gradients: it is a model of its
own, to which the strategy is applied as to the student, so that both have the same part of the vocabulary and of every
sequence. Its parameters are read from its checkpoint (train/checkpoint/teacher.py). An evaluation is the student's
cross-entropy alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.fsdp import FSDPModule

from train.config.fields import IGNORE_INDEX
from train.config.problems import BadInput, Problem
from train.config.technique import Target
from train.strategies.distil.divergence import Divergence


class Teacher:
    """A trained model that gives the logits of tokens. `called`: the module to call, which may wrap the model."""

    def __init__(self, called: nn.Module) -> None:
        self.called = called.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.called(tokens_BT)
        for module in self.called.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward follows that would free the gathered parameters
        return logits


class Distilled(nn.Module):
    """The loss of a student. `cross_entropy`: the loss without a teacher. `group`: the ranks that have the other shards
    of the vocabulary; None if the logits are whole."""

    teacher: Teacher | None = None  # given after the student is built

    def __init__(self, cross_entropy: nn.Module, weight: float, temperature: float, group: ProcessGroup | None) -> None:
        super().__init__()
        self.cross_entropy = cross_entropy
        self.weight, self.temperature, self.group = weight, temperature, group
        self.taught: Tensor | None = None

    def forward(self, logits_BTV: Tensor, targets_BT: Tensor, taught_BTV: Tensor | None = None) -> Tensor:
        entropy: Tensor = self.cross_entropy(logits_BTV, targets_BT)
        if taught_BTV is None:
            return entropy
        counted = targets_BT.flatten() != IGNORE_INDEX
        logits, taught = logits_BTV.flatten(0, 1), taught_BTV.flatten(0, 1)
        apart = Divergence.apply(logits, taught, counted, self.temperature, self.group)
        return (1 - self.weight) * entropy + self.weight * self.temperature**2 * apart

    def ask(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A hook before the student: the teacher computes the same tokens, unless this is an evaluation."""
        if torch.is_grad_enabled():
            if self.teacher is None:  # a benchmark builds a strategy without it
                message = "train.teacher is read in training and in proofs only"
                raise BadInput(Problem("teacher", message, "leave train.teacher out"))
            self.taught = self.teacher(args[0])

    def answer(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook before the loss: it gets the teacher's logits too."""
        taught, self.taught = self.taught, None
        return args if taught is None else (*args, taught)


def apply_distillation(target: Target) -> None:
    """Replace the loss. `tp` is applied before, as it has a loss of its own, and `cp` after, whose hooks select a
    rank's tokens: the teacher, which has such hooks too, gets whole rows."""
    model, train = target.model, target.config.train
    group = target.mesh["tp"].get_group() if target.config.strategy.shards_logits() else None
    model.loss = loss = Distilled(model.loss, train.distil_weight, train.distil_temperature, group)
    model.register_forward_pre_hook(loss.ask)
    loss.register_forward_pre_hook(loss.answer)
