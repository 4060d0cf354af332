"""The constants of the cost model, from `configs/planner.yaml`: each has a value, a reason and a source there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.command.resources import CONFIG_DIR

PATH = CONFIG_DIR / "planner.yaml"


@dataclass(frozen=True)
class Constants:
    """The meaning and the unit of each is in `configs/planner.yaml`."""

    sustained: float
    depth_cost: float
    tail: float
    exp_cost: float
    attention_products: float
    passes: float
    links: float
    network: float
    async_tp_exposed: float
    overlap_cost: float
    unit_us: float
    call_us: float
    layer_us: float
    send_exposed: float
    jitter: float
    step_ms: float


def stored(path: Path = PATH) -> dict[str, dict[str, Any]]:
    """The file's entries: for each constant `value`, `expected`, `spread`, `reason` and `source`."""
    entries: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text())
    return entries


def load(column: str = "value") -> Constants:
    """The constants in use (`value`), or what was expected before any fit (`expected`)."""
    entries = stored()
    return Constants(**{field.name: float(entries[field.name][column]) for field in dataclasses.fields(Constants)})
