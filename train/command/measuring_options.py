"""The options of scripts/matmul.py. Torch is not imported."""

from __future__ import annotations

from typing import Any

from train.command.option import Option, name, positive, text

MATMUL = "scripts/matmul.py"

BUDGET_S: Option[int | None] = Option(
    "budget_s",
    None,
    (MATMUL,),
    *positive(86_400),
    example="100",
    help="The seconds in which to measure, without the start and compilation. What comes too late is left out and "
    "named.",
    unset="150 on a CPU, 45 on an accelerator",
)
NAME: Option[str | None] = Option(
    "name",
    None,
    (MATMUL,),
    "letters, digits, _, . and -",
    name,
    example="my_gpu",
    help="The name of the profile: hardware=measured/NAME takes it.",
    unset="the device's name and the number of processes",
)
BASELINE: Option[str | None] = Option(
    "baseline",
    None,
    (MATMUL,),
    "the name of a measured profile",
    name,
    example="cpu_x1",
    help="An earlier profile, of a CPU for example: a column says how many times as fast this machine is.",
    unset="none",
)
FOLDER: Option[str | None] = Option(
    "folder",
    None,
    (MATMUL,),
    "the name of a folder",
    text,
    example="profiles",
    help="Where the profile is written; hardware=measured/NAME finds only those of the default folder.",
    unset="configs/hardware/measured",
)
PLOT: Option[str | None] = Option(
    "plot",
    None,
    (MATMUL,),
    "the name of a .png or .svg file",
    lambda path: text(path) if path.endswith((".png", ".svg")) else None,
    example="roofline.svg",
    help="A file for a picture of the roofline; it needs matplotlib.",
    unset="none",
)
OPTIONS: tuple[Option[Any], ...] = (BUDGET_S, NAME, BASELINE, FOLDER, PLOT)
