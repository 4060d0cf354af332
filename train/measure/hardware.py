"""A device: its clock, and its published figures from `configs/hardware/`. An unknown device has none of these: they
are not guessed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf

from train.command.resources import CONFIG_DIR
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
    given = config.hardware
    if given.name != "auto":
        return given
    files = (_load(path) for path in sorted((CONFIG_DIR / "hardware").glob("*.yaml")))
    name = device_name(device)
    found = next((file for file in files if file.match is not None and name.endswith(file.match)), None)
    if found is None:
        return given
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.name != "name"}
    peaks = found.peak_tflops | values.pop("peak_tflops")
    sources = found.source | values.pop("source")
    mine = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(found, peak_tflops=peaks, source=sources, **mine)


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """The dense peak for the run's precision in TFLOP/s, or None if unknown."""
    return hardware_of(config, device).peak_tflops.get(config.precision.value)


def _load(path: Path) -> HardwareConfig:
    values = cast(DictConfig, OmegaConf.load(path))
    del values["defaults"]
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), values))
    assert isinstance(hardware, HardwareConfig)
    return hardware
