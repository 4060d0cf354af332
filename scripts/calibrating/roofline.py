"""The roofline picture: the rate of products against their arithmetic intensity (Williams et al. 2009). No torch."""

from __future__ import annotations

import importlib.util

from scripts.calibrating.profile_file import Known
from scripts.calibrating.table import best
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

BYTES = {"float64": 8.0, "float32": 4.0, "bf16": 2.0, "fp8": 1.0}  # per element
COLOURS = ("#3a6ea5", "#c44e1f", "#4d8f4d", "#7f5aa2")


def intensity(row: list[float], size: float) -> float:
    """FLOPs per byte of a product that reads both operands and writes its result once."""
    rows, columns, depth = row[:3]
    return 2 * rows * columns * depth / (size * (rows * depth + depth * columns + rows * columns))


def check_matplotlib() -> None:
    """Raises BadInput (exit code 3) if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        message, fix = "plot= needs matplotlib, which is not installed", 'pip install "strategy-lab[plot]"'
        raise BadInput(Problem("extra", message, fix, exit_code=EXIT_ENVIRONMENT))


def draw(known: Known, path: str) -> str:
    """Write the picture; returns a line that says so. Raises BadInput (exit code 3) if the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    memory = best(known.tables, "copy")
    tables = {name.partition("_")[2]: rows for name, rows in known.tables.items() if name.startswith("products_")}
    for colour, (precision, rows) in zip(COLOURS, tables.items(), strict=False):
        places = [intensity([*row], BYTES[precision]) for row in rows]
        axes.scatter(places, [row[-1] for row in rows], s=14, color=colour, label=f"products, {precision}")
        peak, roof = known.published.peak_tflops.get(precision), best(known.tables, f"products_{precision}")
        if peak:
            axes.axhline(peak, color=colour, lw=0.8, ls=":", label=f"data sheet, {precision}")
        if memory and roof:
            knee = roof * 1e3 / memory
            axes.plot([1, knee, 1e4], [memory / 1e3, roof, roof], color=colour, lw=1.0)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    axes.set_title(f"{known.name}: measured roofline", loc="left")
    axes.legend(frameon=False, fontsize=8)
    try:
        figure.savefig(path)
    except OSError as error:
        message = f"plot={path} cannot be written ({error.strerror})"
        raise BadInput(Problem("plot", message, "use a folder that exists", exit_code=EXIT_ENVIRONMENT)) from error
    return f"picture: {path}"
