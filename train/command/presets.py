"""The presets of the config groups in `configs/`, and the values that the chosen presets set."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from train.command.resources import CONFIG_DIR
from train.command.schemas import SCHEMAS
from train.config.strategy import Strategy

ROOT = "config"


def names(group: str) -> list[str]:
    """The presets of a config group."""
    folder = CONFIG_DIR / group
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


@cache
def strategies() -> dict[str, Strategy]:
    """Every preset of a strategy, by name. The result is cached, so callers must not change it."""
    found: dict[str, Strategy] = {}
    for name in names("strategy"):
        found[name] = SCHEMAS["strategy", _schema("strategy", name)](**_preset("strategy", name))
    return found


def preset_values(overrides: Sequence[str]) -> dict[str, Any]:
    """The values, by dotted key, before the overrides of single keys: those of the presets that the command line
    chooses, then those of the root file, which take precedence."""
    root = _file(CONFIG_DIR / f"{ROOT}.yaml")
    names = {group: name for one in root["defaults"] if isinstance(one, dict) for group, name in one.items()}
    words = (word.lstrip("+").partition("=") for word in overrides)
    names |= {group: name for group, _, name in words if group in names}
    found = {f"{group}.{key}": value for group, name in names.items() for key, value in _preset(group, name).items()}
    of_root = {group: keys for group, keys in root.items() if isinstance(keys, dict)}
    return found | {f"{group}.{key}": value for group, keys in of_root.items() for key, value in keys.items()}


def _preset(group: str, name: str) -> dict[str, Any]:
    """The keys of a preset, which take precedence over those of the presets that it inherits from. Interpolations are
    left out, as they are not resolved yet."""
    content = _file(CONFIG_DIR / group / f"{name}.yaml")
    values: dict[str, Any] = {}
    for parent in content["defaults"]:
        if isinstance(parent, str) and not parent.startswith("_"):  # otherwise it is a schema, or Hydra's _self_
            values |= _preset(group, parent)
    return values | {key: value for key, value in content.items() if key != "defaults" and "${" not in str(value)}


def _schema(group: str, name: str) -> str:
    """The schema that the preset inherits from, itself or by another preset."""
    parents = [one for one in _file(CONFIG_DIR / group / f"{name}.yaml")["defaults"] if one != "_self_"]
    return next((one for one in parents if one.startswith("_")), "") or _schema(group, parents[0])


@cache
def _file(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {"defaults": [], **content}
