"""A device: its clock, and its published figures. An unknown device has none of these: they are not guessed."""

from __future__ import annotations

import time
from typing import Any

import torch

from train.command.planning.hardware import published
from train.config.schema import Config, HardwareConfig


class Clock:
    """Measures time by events of the device or, for a CPU, by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: Any, end: Any) -> float:
        """The time between two marks. Waits for `end` if it has not happened yet."""
        if self.device.type == "cpu":
            return (end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))


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
