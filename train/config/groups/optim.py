"""The keys under `optim`: the optimiser and its learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from train.config.fields import LARGE, MAX_STEPS, key, number

AT_ONCE = 2**24  # the elements of a parameter that adamw8bit updates at a time, as each needs many temporary bytes


class Optimiser(Enum):
    adamw = "adamw"
    adamw8bit = "adamw8bit"
    sgd = "sgd"


class LrSchedule(Enum):
    cosine = "cosine"
    linear = "linear"
    constant = "constant"


@dataclass
class OptimConfig:
    name: Optimiser = key(MISSING, "The optimiser; optim=NAME sets it together with its learning rate.")
    lr: float = number(
        MISSING, "The highest learning rate, which is reached at the end of the warm-up.", ge=0, le=LARGE, example=1e-3
    )
    weight_decay: float = number(
        MISSING, "The weight decay of matrices; norms do not decay.", ge=0, le=1e6, example=0.1
    )
    warmup_steps: int = number(
        10,
        "The optimiser steps over which the learning rate rises linearly to optim.lr. Step 1 trains at "
        "optim.lr / optim.warmup_steps; with the schedules of transformers it would train at 0.",
        ge=0,
        le=MAX_STEPS,
    )
    schedule: LrSchedule = key(LrSchedule.cosine, "How the learning rate falls from the warm-up to the last step.")
    min_lr_ratio: float = number(0.1, "The learning rate of the last step as a share of optim.lr.", ge=0, le=1)
    beta1: float = number(0.9, "AdamW's decay rate for the mean of the gradients.", ge=0, lt=1)
    beta2: float = number(0.95, "AdamW's decay rate for the mean of the squared gradients.", ge=0, lt=1)
    eps: float = number(1e-8, "AdamW adds this to the denominator of its update.", gt=0, le=LARGE)
    momentum: float = number(0.0, "SGD's momentum.", ge=0, lt=1)
