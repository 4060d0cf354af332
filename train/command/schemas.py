"""The dataclass behind each config group, by the name that presets inherit from."""

from __future__ import annotations

from train.config.schema import Config, DataConfig, HardwareConfig, ModelConfig, OptimConfig
from train.strategies.deepspeed.strategy import DeepSpeed
from train.strategies.pipelined import Pipeline
from train.strategies.spmd import Spmd

SCHEMAS: dict[tuple[str | None, str], type] = {
    (None, "_config"): Config,
    ("strategy", "_spmd"): Spmd,
    ("strategy", "_pipeline"): Pipeline,
    ("strategy", "_deepspeed"): DeepSpeed,
    ("model", "_model"): ModelConfig,
    ("data", "_data"): DataConfig,
    ("optim", "_optim"): OptimConfig,
    ("hardware", "_hardware"): HardwareConfig,
}
