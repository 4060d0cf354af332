"""The published figures of the device that a run uses."""

from __future__ import annotations

import torch

from train.command.planning.hardware import published
from train.config.schema import Config, HardwareConfig


def device_name(device: torch.device) -> str:
    """The driver's name of the device; `cpu` for a CPU."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def hardware_of(config: Config, device: torch.device) -> HardwareConfig:
    """The figures of the hardware that the config names or, under `auto`, of the file that matches the device's name.
    Under `auto`, values that the user gives replace those of the file."""
    return published(config.hardware, device_name(device))


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """The dense peak for the run's precision in TFLOP/s, or None if unknown."""
    return hardware_of(config, device).peak_tflops.get(config.precision.value)
