"""The figures of a device, from `configs/hardware/`, found by its name. Torch is not imported.

Published figures are in the files of that folder, those that were measured on a machine in its folder `measured`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf

from train.command.resources import CONFIG_DIR
from train.config.schema import HardwareConfig

AUTO = "auto"
FOLDER = CONFIG_DIR / "hardware"


def published(given: HardwareConfig, device: str) -> HardwareConfig:
    """The given figures or, under `auto`, those of the file that matches the name of the device; those that are given
    replace the file's. An unknown device has none: they are not guessed."""
    if given.name != AUTO:
        return given
    found = next((file for file in files(FOLDER) if matches(file, device)), None)
    return given if found is None else replaced(found, given)


def measured(given: HardwareConfig, device: str) -> list[HardwareConfig]:
    """The profiles that were measured on such a device."""
    return [replaced(file, given) for file in files(FOLDER / "measured") if matches(file, device)]


def matches(file: HardwareConfig, device: str) -> bool:
    return file.match is not None and device.endswith(file.match)


def replaced(found: HardwareConfig, given: HardwareConfig) -> HardwareConfig:
    """The figures of a file, with those that are given in their place; tables are joined."""
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.name != "name"}
    joined = {name: getattr(found, name) | value for name, value in values.items() if isinstance(value, dict)}
    mine = {name: value for name, value in values.items() if value is not None and name not in joined}
    return dataclasses.replace(found, **joined, **mine)


def file_named(name: str) -> HardwareConfig:
    return _load(FOLDER / f"{name}.yaml")


def files(folder: Path) -> list[HardwareConfig]:
    return [_load(path) for path in sorted(folder.glob("*.yaml"))]


def _load(path: Path) -> HardwareConfig:
    values = cast(DictConfig, OmegaConf.load(path))
    del values["defaults"]
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), values))
    assert isinstance(hardware, HardwareConfig)
    return hardware
