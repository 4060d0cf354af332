"""A device's published figures, from `configs/hardware/`. An unknown device has none, and nothing is made up."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from omegaconf import DictConfig, OmegaConf

from train.cli import CONFIG_DIR
from train.config import Config, HardwareConfig


def device_name(device: torch.device) -> str:
    """What the driver calls the device; `cpu` for a CPU."""
    if device.type == "cpu":
        return "cpu"
    return str(torch.get_device_module(device).get_device_name(device))


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Dense peak for the run's precision in TFLOP/s, from the named hardware or by the device's name, or None."""
    hardware = config.hardware
    if hardware.name == "auto":
        known = (_load(path) for path in sorted((CONFIG_DIR / "hardware").glob("*.yaml")))
        name = device_name(device)
        hardware = next((h for h in known if h.match is not None and h.match in name), hardware)
    return hardware.peak_tflops.get(config.precision.value)


def _load(path: Path) -> HardwareConfig:
    values = cast(DictConfig, OmegaConf.load(path))
    del values["defaults"]
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), values))
    assert isinstance(hardware, HardwareConfig)
    return hardware
