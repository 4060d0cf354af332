"""The optimiser, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from train.config import LrSchedule, OptimConfig, Optimiser


def decays(parameter: nn.Parameter) -> bool:
    """Matrices decay, norms do not: by the whole parameter's shape, which a shard keeps."""
    return parameter.ndim >= 2


def build_optimiser(parameters: dict[str, nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over this rank's shards, in groups with and without weight decay."""
    by_kind: dict[tuple[bool, Any], list[nn.Parameter]] = {}
    for p in parameters.values():  # by mesh too: one fused update takes the DTensors of one mesh
        by_kind.setdefault((decays(p), getattr(p, "device_mesh", None)), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": ps, "weight_decay": config.weight_decay if decay else 0.0} for (decay, _), ps in by_kind.items()
    ]
    if config.name is Optimiser.sgd:  # foreach: its fused kernel does not know DTensors (torch 2.13)
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, foreach=True)
    options: dict[str, Any] = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    try:
        return torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:  # no fused kernel for this device
        return torch.optim.AdamW(groups, foreach=True, **options)


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr


def lr_at(step: int, num_steps: int, config: OptimConfig) -> float:
    """The rate of step 1, 2, … `num_steps`: linear warm-up, then cosine, linear or no decay to `min_lr_ratio`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(num_steps - config.warmup_steps, 1)
    decay = {
        LrSchedule.cosine: (1 + math.cos(math.pi * progress)) / 2,
        LrSchedule.linear: 1 - progress,
        LrSchedule.constant: 1.0,
    }[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * decay)
