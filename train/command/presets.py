"""The values that presets give, before any key is set by itself: what a run has where nobody chose otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

ROOT = "config"


def values(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """By dotted key, of the presets that a command line chooses, and of the root file, which comes last."""
    root = _file(folder / f"{ROOT}.yaml")
    chosen = {group: name for one in root["defaults"] if isinstance(one, dict) for group, name in one.items()}
    chosen |= {group: name for group, _, name in (word.lstrip("+").partition("=") for word in overrides)
               if group in chosen}  # fmt: skip
    found = {f"{group}.{key}": value for group, name in chosen.items() for key, value in _preset(folder / group, name)}
    of_root = {group: keys for group, keys in root.items() if group != "defaults" and isinstance(keys, dict)}
    return found | {f"{group}.{key}": value for group, keys in of_root.items() for key, value in keys.items()}


def _preset(group: Path, name: str) -> list[tuple[str, Any]]:
    """Its keys and values, after those of the presets that it inherits from; interpolations are no values yet."""
    content = _file(group / f"{name}.yaml")
    parents = [one for one in content["defaults"] if isinstance(one, str) and not one.startswith("_")]
    own = [(key, value) for key, value in content.items() if key != "defaults" and "${" not in str(value)]
    return [*(pair for parent in parents for pair in _preset(group, parent)), *own]


@cache
def _file(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {"defaults": [], **content}
