"""A run's directory and what stands in it beside the metrics: config, versions, summary."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from itertools import count
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from train.config import Config
from train.hardware import device_name


def make_run_dir(config: Config, tree: DictConfig, degrees: dict[str, int], world_size: int) -> Path:
    """`<metrics.dir>/<strategy>-<degrees>-ws<world>-<6 digits of the config's hash>`; a second start adds -2."""
    shown = "-".join(f"{axis}{degrees[axis]}" for axis in config.strategy.mesh_axes())
    digest = hashlib.sha256(OmegaConf.to_yaml(tree, resolve=True, sort_keys=True).encode()).hexdigest()[:6]
    name = "-".join(part for part in (config.strategy.name, shown, f"ws{world_size}", digest) if part)
    for number in count(1):
        path = Path(config.metrics.dir) / (name if number == 1 else f"{name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    (path / "config.yaml").write_text(OmegaConf.to_yaml(tree, resolve=True))
    return path


def environment(device: torch.device, backend: str, world_size: int) -> dict[str, Any]:
    """What a figure must travel with."""
    return {
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device_name(device),
        "platform": platform.platform(),
        "backend": backend,
        "world_size": world_size,
        "omp_threads": torch.get_num_threads(),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    (path / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


def _commit() -> str:
    """The commit of this source tree, with + if it was changed since; empty outside git."""
    try:
        here = Path(__file__).parent
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip()
