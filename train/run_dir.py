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
from torch.distributed.device_mesh import DeviceMesh

from train.config import Config
from train.hardware import device_name
from train.strategies.base import MESH_AXES


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


def draw_mesh(mesh: DeviceMesh) -> str:
    """Ranks by axis: the innermost axis left to right, the next one down, and outer axes as blocks.

    pp=0
      dp_shard \\ tp   0  1
      0               0  1
      1               2  3
    """
    used = [axis for axis in MESH_AXES if mesh[axis].size() > 1]
    if not used:
        return "rank 0 alone"
    ranks = mesh.mesh.reshape([mesh[axis].size() for axis in used])
    while len(used) < 2:
        used.insert(0, "")
        ranks = ranks.unsqueeze(0)
    row, column = used[-2:]
    corner = f"{row} \\ {column}" if row else column
    width = max(len(str(int(ranks.max()))), 2) + 1
    lines: list[str] = []
    for index in _indices(ranks.shape[:-2]):
        if index:
            lines.append(" ".join(f"{axis}={i}" for axis, i in zip(used, index, strict=False)))
        lines.append("  " + corner + "".join(f"{i:>{width}}" for i in range(ranks.shape[-1])))
        for i, line in enumerate(ranks[index].tolist()):
            lines.append("  " + f"{i if row else 'rank':<{len(corner)}}" + "".join(f"{r:>{width}}" for r in line))
    return "\n".join(lines)


def _indices(shape: torch.Size) -> list[tuple[int, ...]]:
    return (
        [
            tuple(int(i) for i in index)
            for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape))
        ]
        if shape
        else [()]
    )


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
