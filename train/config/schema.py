"""The schema of a run: every key has a type, a range, a default and a sentence. Torch is not imported.

The keys are in `groups/`, one dataclass for each group; values are in `configs/`, rules between keys in `rules/`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from train.config.fields import key
from train.config.groups.data import DataConfig, DataSource, TokenType
from train.config.groups.hardware import HardwareConfig
from train.config.groups.model import AttentionKernel, Balance, ModelConfig, ScoreFunction
from train.config.groups.optim import LrSchedule, OptimConfig, Optimiser
from train.config.groups.run import MetricsConfig, RuntimeConfig, Tracker
from train.config.groups.train import (
    ActivationCheckpointing,
    CompileConfig,
    CompileMode,
    OnNonfinite,
    Precision,
    TrainConfig,
)
from train.config.strategy import Strategy

__all__ = [
    "ActivationCheckpointing",
    "AttentionKernel",
    "Balance",
    "CompileConfig",
    "CompileMode",
    "Config",
    "DataConfig",
    "DataSource",
    "HardwareConfig",
    "LrSchedule",
    "MetricsConfig",
    "ModelConfig",
    "OnNonfinite",
    "OptimConfig",
    "Optimiser",
    "Precision",
    "RuntimeConfig",
    "ScoreFunction",
    "TokenType",
    "Tracker",
    "TrainConfig",
]


@dataclass
class Config:
    """Everything that decides a run but the number of processes."""

    strategy: Strategy = key(MISSING, "How the work of training is split over the processes.")
    model: ModelConfig = key(MISSING, "The transformer that is trained.")
    data: DataConfig = key(MISSING, "The text that it is trained on.")
    optim: OptimConfig = key(MISSING, "The optimiser and its learning rate.")
    hardware: HardwareConfig = key(MISSING, "The published figures of the device, for what is logged and checked.")
    train: TrainConfig = key(TrainConfig, "The training itself: steps, batches, validation, memory.")
    precision: Precision = key(
        Precision.float32,
        "The type that is computed in; bf16 computes in bfloat16, with parameters, gradients and sums in float32.",
    )
    compile: CompileConfig = key(CompileConfig, "Compilation by torch.compile.")
    runtime: RuntimeConfig = key(RuntimeConfig, "The device and the communication backend.")
    metrics: MetricsConfig = key(MetricsConfig, "What a run writes down, and where.")


@dataclass
class Composed(Config):
    """A config as the command line composes it. `preset`: by dotted key, the values that the chosen presets give."""

    preset: dict[str, Any] = field(default_factory=dict)
