"""The optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train.config.schema import LrSchedule, OptimConfig, Optimiser
from train.ranks.gradients import local
from train.ranks.quiet import quiet_torchao
from train.ranks.state import Piece, in_memory


def decays(parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices, not to norms. A shard has as many dimensions as its parameter."""
    return parameter.ndim >= 2


def build_optimiser(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimiser for plain tensors, in one group with and one without weight decay."""
    by_decay: dict[bool, list[nn.Parameter]] = {}
    for p in parameters.values():
        by_decay.setdefault(decays(p), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": ps, "weight_decay": config.weight_decay if decay else 0.0} for decay, ps in by_decay.items()
    ]
    kind: Any = torch.optim.AdamW
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if config.name is Optimiser.adamw8bit:
        quiet_torchao()
        from train.ranks.eight_bit import EightBitAdamW

        return EightBitAdamW(groups, **options)
    if config.name is Optimiser.sgd:
        kind, options = torch.optim.SGD, {"lr": config.lr, "momentum": config.momentum}
    try:
        return kind(groups, fused=True, **options)
    except RuntimeError:  # torch has no fused kernel for this device
        return kind(groups, foreach=True, **options)


class ShardOptimiser:
    """Updates this rank's shards in place, as plain tensors. This is correct because both optimisers are elementwise.

    If the optimiser had DTensors, torch would plan each fused update as an operator over the mesh. This takes minutes
    in the first step on a mesh of four axes (torch 2.13), and host time in every step.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.parameters = parameters
        with torch.no_grad():
            self.shards = {
                name: nn.Parameter(local(p)) if isinstance(p, DTensor) else p for name, p in parameters.items()
            }
        self.inner = build_optimiser(self.shards, config)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with this learning rate and the parameters' gradients, which are then freed."""
        pairs = list(zip(self.parameters.values(), self.shards.values(), strict=True))
        for p, shard in pairs:
            if isinstance(p, DTensor):
                shard.data = local(p)  # FSDP may have moved it
                if p.grad is not None:
                    assert isinstance(p.grad, DTensor) and p.grad.placements == p.placements, "other placements"
                    shard.grad = local(p.grad)
        set_lr(self.inner, lr)
        self.inner.step()
        for p, shard in pairs:
            p.grad = shard.grad = None

    @torch.no_grad()
    def take(self, pieces: Iterable[Piece]) -> None:
        """Give the state back what `ranks.state.pieces_of` gave as copies: what is kept in few bits. It is quantised
        anew, which can change it a little."""
        for piece in pieces:
            state = self.inner.state.get(self.shards[piece.name], {}) if piece.of_optimiser else {}
            if piece.kind in state and state[piece.kind] is not piece.tensor:
                state[piece.kind].copy_(piece.tensor)

    def codes(self) -> dict[str, Tensor]:
        """What is kept in few bits, by name, as only the same layout can read it."""
        return {
            f"{name}/{kind}/{number}": part
            for name, shard in self.shards.items()
            for kind, value in self.inner.state.get(shard, {}).items()
            for number, part in enumerate(in_memory(value) if isinstance(value, Tensor) else [])
            if part is not value
        }

    @torch.no_grad()
    def make_state(self) -> None:
        """Make the state that the first step would make, for a checkpoint to fill: a step with gradients of zero and a
        learning rate of 0 changes no weight."""
        for shard in self.shards.values():
            shard.grad = torch.zeros_like(shard)
        set_lr(self.inner, 0.0)
        self.inner.step()
        for shard in self.shards.values():
            shard.grad = None


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The learning rate of step 1, 2, … `num_steps`: a linear warm-up, then a cosine, linear or no decay to
    `min_lr_ratio` x `lr`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    decay = {
        LrSchedule.cosine: (1 + math.cos(math.pi * progress)) / 2,
        LrSchedule.linear: 1 - progress,
        LrSchedule.constant: 1.0,
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)
