"""How far predictions of tokens/s were off on runs of others, by regime, from `configs/planner_intervals.yaml`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from train.command.planning.job import LOW_PRECISION, Job
from train.command.resources import CONFIG_DIR

PATH = CONFIG_DIR / "planner_intervals.yaml"
ALL = "all"
SINGLE, SPREAD, DATA, CONTEXT = "single node", "multi-node TP/PP", "multi-node data parallel", "CP"
NODE = 8  # devices of a single node


@dataclass(frozen=True)
class Interval:
    """An 80 % interval of log(measured / predicted), from so many rows of so many sources."""

    low: float
    high: float
    rows: int
    sources: int

    def around(self, predicted: float) -> tuple[float, float]:
        return predicted * math.exp(self.low), predicted * math.exp(self.high)


def regimes(devices: int, *, splits_model: bool, cp: int, precision: str) -> list[str]:
    """The regimes of a run, the one that its interval comes from first. `splits_model`: by tp or pp."""
    if precision in LOW_PRECISION:
        return [precision]
    first = SINGLE if devices <= NODE else SPREAD if splits_model else DATA
    return [first, *([CONTEXT] if cp > 1 else [])]


def regime_of(job: Job) -> str:
    degrees = job.plan.degrees
    splits = degrees["tp"] > 1 or degrees["pp"] > 1
    return regimes(job.plan.world_size, splits_model=splits, cp=degrees["cp"], precision=job.products)[0]


def interval_of(job: Job, stored: dict[str, Interval]) -> Interval:
    return stored.get(regime_of(job), stored[ALL])


def load(path: Path = PATH) -> dict[str, Interval]:
    return {name: Interval(**entry) for name, entry in yaml.safe_load(path.read_text()).items()}
