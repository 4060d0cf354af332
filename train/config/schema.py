"""The schema of a run: every key has a type, a range, a default and a sentence of help. Torch is not imported.

`groups/` has the keys, with one dataclass for each group. Values are in `configs/`, and rules between keys in `rules/`.
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
from train.config.groups.run import CheckpointConfig, MetricsConfig, RuntimeConfig, SaveMode, Tracker
from train.config.groups.train import (
    ActivationCheckpointing,
    CompileConfig,
    Fp8Scaling,
    OnNonfinite,
    Precision,
    Qat,
    TrainConfig,
)
from train.config.strategy import Strategy

EIGHT_BITS = (
    "optim=adamw8bit keeps moments in 8 bits, in blocks of 256 elements of each rank's part of a parameter, so that "
    "another layout rounds other blocks"
)

__all__ = [
    "ActivationCheckpointing",
    "AttentionKernel",
    "Balance",
    "CheckpointConfig",
    "CompileConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "Fp8Scaling",
    "HardwareConfig",
    "LrSchedule",
    "MetricsConfig",
    "ModelConfig",
    "OnNonfinite",
    "OptimConfig",
    "Optimiser",
    "Precision",
    "Qat",
    "RuntimeConfig",
    "SaveMode",
    "ScoreFunction",
    "TokenType",
    "Tracker",
    "TrainConfig",
]


@dataclass
class Config:
    """Everything that determines a run except the number of processes."""

    strategy: Strategy = key(MISSING, "How the work of training is split over the processes.")
    model: ModelConfig = key(MISSING, "The transformer that is trained.")
    data: DataConfig = key(MISSING, "The text that it is trained on.")
    optim: OptimConfig = key(MISSING, "The optimiser and its learning rate.")
    hardware: HardwareConfig = key(MISSING, "The published figures of the device, for what is logged and checked.")
    train: TrainConfig = key(TrainConfig, "The training itself: steps, batches, validation, memory.")
    precision: Precision = key(
        Precision.float32,
        "The type of numbers; bf16 computes in bfloat16, and keeps parameters, gradients and sums in float32; fp8 also "
        "multiplies in 8 bits.",
    )
    compile: CompileConfig = key(CompileConfig, "Compilation by torch.compile.")
    runtime: RuntimeConfig = key(RuntimeConfig, "The device and the communication backend.")
    metrics: MetricsConfig = key(MetricsConfig, "What a run records, and where.")
    checkpoint: CheckpointConfig = key(CheckpointConfig, "What a run saves, and from what it goes on.")

    def differs(self) -> dict[str, str]:
        """The columns of the proof that are expected to differ from one device's values, each with its reason: those of
        the strategy, and of the optimiser."""
        found = self.strategy.differs()
        if self.optim.name is Optimiser.adamw8bit:
            columns = ("adamw_loss", "evaluate", *(("routing", "router_bias") if self.model.num_experts else ()))
            found = dict.fromkeys(columns, EIGHT_BITS) | found
        return found


@dataclass
class Composed(Config):
    """A config as the command line composes it. `preset`: the values of the chosen presets, by dotted key."""

    preset: dict[str, Any] = field(default_factory=dict)
