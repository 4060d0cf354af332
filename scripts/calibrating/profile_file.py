"""The file of a measured profile, configs/hardware/measured/NAME.yaml. Torch is not imported."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.command.planning.profile import Tables, check
from train.command import cli
from train.command.resources import CONFIG_DIR
from train.config.groups.hardware import HardwareConfig
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.record.run_files import write_whole

FOLDER = CONFIG_DIR / "hardware" / "measured"
DIGITS = 5  # significant ones of a figure
# keys of the published figures that a profile has of its own, or that are the user's
NOT_KEPT = ("name", "measured", "source", "price_usd_per_hour", "grid_gco2_per_kwh")


@dataclass(frozen=True)
class Known:
    """A profile and the published figures of its device. `machine`: the environment in which it was measured."""

    name: str
    published: HardwareConfig
    tables: Tables
    machine: dict[str, Any]


def name_of(device: str, world_size: int) -> str:
    """For example `nvidia_h100_80gb_hbm3_x2`."""
    return f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}_x{world_size}"


def read(name: str) -> Known:
    """An earlier profile. Raises BadInput if there is none of this name, or if it cannot be used."""
    hardware = cli.configured(["strategy=single", f"hardware=measured/{name}"]).hardware
    check(hardware)
    return Known(name, hardware, hardware.measured, {})


def write(known: Known, folder: str | None) -> str:
    """Write the profile; returns its path. `folder`: another one than that of the presets. Raises BadInput (exit code
    3) if it cannot be written."""
    path = (Path(folder) if folder else FOLDER) / f"{known.name}.yaml"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text(known))
    except OSError as error:
        message = f"{path} cannot be written ({error.strerror})"
        problem = Problem("profile", message, "use folder=FOLDER", exit_code=EXIT_ENVIRONMENT)
        raise BadInput(problem) from error
    return f"{path}" if folder else f"{path}; hardware=measured/{known.name} takes it"


def text(known: Known) -> str:
    m = known.machine
    where = f"scripts/matmul.py on {m['world_size']} x {m['device']}, {m['omp_threads']} threads, torch {m['torch']}"
    lines = [f"# Measured by {where}.", "defaults: [_hardware]", f"name: {known.name}"]
    lines += [_line({key: value}) for key, value in figures(known).items()]
    lines.append("measured:")
    for name, rows in known.tables.items():
        lines.append(f"  {name}:")
        lines += [f"  - [{', '.join(map(_shown, row))}]" for row in rows]
    lines.append("source:")
    source = known.published.source | {
        "matmul_tflops": "the fastest product below",
        "measured": f"{where}, commit {m['commit']}",
    }
    return "\n".join([*lines, *(f"  {_line({key: value})}" for key, value in source.items()), ""])


def figures(known: Known) -> dict[str, Any]:
    """The published figures that are known, with the measured rates of products."""
    found: dict[str, Any] = {"match": known.machine["device"]}
    for field in dataclasses.fields(known.published):
        value = getattr(known.published, field.name)
        if field.name not in NOT_KEPT and value not in (None, {}):
            found[field.name] = value
    products = {name.partition("_")[2]: rows for name, rows in known.tables.items() if name.startswith("products_")}
    highest = {name: float(_shown(max(row[-1] for row in rows))) for name, rows in products.items()}
    return found | {"matmul_tflops": highest}


def _line(entry: dict[str, Any]) -> str:
    """One key and its value as a line of YAML."""
    return yaml.safe_dump(entry, default_flow_style=True, width=10**6, sort_keys=False).strip()[1:-1]


def _shown(value: float) -> str:
    """Without an exponent, which YAML takes for a text where there is no point before it."""
    if value == int(value):
        return str(int(value))
    return f"{float(f'{value:.{DIGITS}g}'):.12f}".rstrip("0").removesuffix(".")
