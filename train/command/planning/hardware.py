"""The figures of a device, from `configs/hardware/`, found by its name. Torch is not imported.

Published figures are in the files of that folder, those that were measured on a machine in its folder `measured`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import yaml
from omegaconf import DictConfig, OmegaConf

from train.command.resources import CONFIG_DIR
from train.config.schema import HardwareConfig

AUTO = "auto"
FOLDER = CONFIG_DIR / "hardware"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def published(given: HardwareConfig, device: str) -> HardwareConfig:
    """The given figures or, under `auto`, those of the file that matches the name of the device; those that are given
    replace the file's. An unknown device has none: they are not guessed."""
    if given.name != AUTO:
        return given
    found = next(_matching(FOLDER, device), None)
    return given if found is None else replaced(found, given)


def measured(given: HardwareConfig, device: str) -> list[HardwareConfig]:
    """The profiles that were measured on such a device."""
    return [replaced(file, given) for file in _matching(FOLDER / "measured", device)]


def _matching(folder: Path, device: str) -> Iterator[HardwareConfig]:
    """The files of the folder that match the name of the device. The others are not composed, which takes long."""
    for path in sorted(folder.glob("*.yaml")):
        match = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER).get("match")
        if match is not None and device.endswith(match):
            yield load(path)


def replaced(found: HardwareConfig, given: HardwareConfig) -> HardwareConfig:
    """The figures of a file, with those that are given in their place; tables are joined."""
    values = {field.name: getattr(given, field.name) for field in dataclasses.fields(given) if field.name != "name"}
    joined = {name: getattr(found, name) | value for name, value in values.items() if isinstance(value, dict)}
    mine = {name: value for name, value in values.items() if value is not None and name not in joined}
    return dataclasses.replace(found, **joined, **mine)


def file_named(name: str) -> HardwareConfig:
    return load(FOLDER / f"{name}.yaml")


def load(path: Path) -> HardwareConfig:
    values = cast(DictConfig, OmegaConf.load(path))
    del values["defaults"]
    hardware = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(HardwareConfig), values))
    assert isinstance(hardware, HardwareConfig)
    return hardware
