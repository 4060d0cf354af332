"""The presets of the config groups, as they stand in `configs/`."""

from __future__ import annotations

from functools import cache

import yaml

from train.command.resources import CONFIG_DIR
from train.command.schemas import SCHEMAS
from train.config.strategy import Strategy


def options(group: str) -> list[str]:
    """The presets of a config group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def groups() -> list[str]:
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir())


@cache
def strategies() -> dict[str, Strategy]:
    """Every preset of a strategy, by name. Not to be changed: the answer is kept."""
    found: dict[str, Strategy] = {}
    for name in options("strategy"):
        values = yaml.safe_load((CONFIG_DIR / "strategy" / f"{name}.yaml").read_text())
        (schema,) = values.pop("defaults")
        found[name] = SCHEMAS["strategy", schema](**values)
    return found
