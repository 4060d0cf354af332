"""A sampled step as pictures: what each rank did when, what it held at its peak, and where it stands in the mesh.

Needs matplotlib (the extra `plot`). The record is that of samples/step-<N>.json.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from train.drawing import mesh_blocks

WIDTH, DPI = 7.0, 110  # inches and dots an inch: TensorBoard shows a picture at about half of its size first
MAX_ROWS = 32  # ranks that a picture has room for
# kind of a piece of work -> (colour, what the legend says)
WORK = {
    "F": ("#4878a8", "forward"),
    "B": ("#d9863d", "backward"),
    "I": ("#d9863d", "backward to inputs"),
    "W": ("#8c6bb1", "backward to weights"),
}
MEMORY = {
    "parameters": "#4878a8",
    "gradients": "#d9863d",
    "optimiser": "#5a9e6f",
    "activations": "#8c6bb1",
    "communication": "#c44e52",
    "temporary": "#b8a05a",
    "untracked": "#9a9a9a",
}


def figures(sample: dict[str, Any], degrees: dict[str, int] | None = None) -> dict[str, Figure]:
    """By tag; without `degrees`, those of every axis of the mesh, there is no picture of the mesh."""
    ranks = sample["ranks"]
    drawn = {"timeline": timeline(sample["step"], ranks), "memory": memory(sample["step"], ranks)}
    if degrees is not None:
        drawn["mesh"] = mesh(sample["step"], ranks, degrees)
    return {f"figures/{name}": figure for name, figure in drawn.items() if figure is not None}


def timeline(step: int, ranks: list[dict[str, Any]]) -> Figure | None:
    """A row for each rank, a bar for each piece of work, numbered by microbatch where there is room."""
    shown = ranks[:MAX_ROWS]
    pieces = [piece for rank in shown for piece in rank["timeline"]]
    if not pieces:
        return None
    end = max(max(piece[4] for piece in pieces), max(rank["step_ms"] for rank in shown))
    several = len({(index, piece[1]) for index, rank in enumerate(shown) for piece in rank["timeline"]}) > len(shown)
    figure = Figure(figsize=(WIDTH, 1.2 + 0.4 * len(shown)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for row, rank in enumerate(shown):
        first = min((piece[1] for piece in rank["timeline"]), default=0)
        for kind, stage, microbatch, start, stop in rank["timeline"]:
            colour, _ = WORK[kind]
            # a rank's second stage is a lighter shade of the same colour
            alpha = 0.55 if several and stage != first else 1.0
            axes.barh(row, stop - start, left=start, height=0.8, color=colour, alpha=alpha, edgecolor="white", lw=0.4)
            if stop - start > 0.02 * end:
                axes.text((start + stop) / 2, row, str(microbatch), ha="center", va="center", color="white", size=8)
    did = {WORK[piece[0]] for piece in pieces}
    legend = [
        Patch(color=colour, label=label) for colour, label in dict.fromkeys(WORK.values()) if (colour, label) in did
    ]
    axes.set(xlim=(0, end), xlabel="ms from the start of the step; blank: waiting, or exposed communication")
    axes.set_title(f"step {step}: what each rank did{_of(ranks)}", loc="left", size=11)
    figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), frameon=False, fontsize=8)
    _name_rows(axes, shown)
    return figure


def memory(step: int, ranks: list[dict[str, Any]]) -> Figure | None:
    """What each rank held at its peak, by kind, and the whole over the step, where it was sampled."""
    shown = [rank for rank in ranks[:MAX_ROWS] if rank["memory"]["at_peak_mib"]]
    curves = [rank for rank in shown if rank["memory"]["curve"]]
    if not shown:
        return None
    heights = [0.9 + 0.32 * len(shown), 2.2][: 2 if curves else 1]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.3), dpi=DPI, layout="constrained")
    bars, *rest = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    ends = [0.0] * len(shown)
    for kind, colour in MEMORY.items():
        sizes = [rank["memory"]["at_peak_mib"].get(kind, 0.0) for rank in shown]
        if any(sizes):
            bars.barh(range(len(shown)), sizes, left=ends, height=0.8, color=colour, label=kind)
        ends = [a + b for a, b in zip(ends, sizes, strict=True)]
    for row, size in enumerate(ends):
        bars.text(size, row, f" {size:,.1f}", va="center", size=8)
    bars.set(xlim=(0, 1.15 * max(ends)), xlabel="MiB at the rank's own peak")
    bars.set_title(f"step {step}: memory by kind{_of(ranks)}", loc="left", size=11)
    _name_rows(bars, shown)
    for axes in rest:
        largest = max(curves, key=lambda rank: max(mib for _, mib in rank["memory"]["curve"]))
        for rank in sorted(curves, key=lambda rank: rank is largest):
            style: dict[str, Any] = {"color": "0.7", "lw": 0.8}
            if rank is largest:
                style = {"color": "#c44e52", "lw": 1.4, "label": f"rank {rank['rank']}, the largest"}
            axes.step(*zip(*rank["memory"]["curve"], strict=True), where="post", **style)
        axes.set(xlabel="ms from the start of the step", ylabel="MiB", ylim=(0, None))
        axes.set_title("over the step, each rank", loc="left", size=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.legend(*bars.get_legend_handles_labels(), loc="outside upper right", ncols=7, frameon=False, fontsize=8)
    return figure


def mesh(step: int, ranks: list[dict[str, Any]], degrees: dict[str, int]) -> Figure:
    """Where each rank stands, and how long it computed: the slowest is the darkest."""
    computed = {
        rank["rank"]: sum(ms for part, ms in rank["parts_ms"].items() if part in ("forward", "backward", "optimiser"))
        for rank in ranks
    }
    row_axis, column_axis, blocks = mesh_blocks(degrees)
    blocks = blocks[:MAX_ROWS]
    rows, columns = len(blocks[0][1]), len(blocks[0][1][0])
    across = min(len(blocks), max(8 // columns, 1))
    down = math.ceil(len(blocks) / across)
    size = (1.2 + across * (0.6 + 0.9 * columns), 1.0 + down * (0.7 + 0.6 * rows))
    figure = Figure(figsize=(max(size[0], 5.0), size[1]), dpi=DPI, layout="constrained")
    low, high = min(computed.values()), max(computed.values())
    scale = Normalize(min(low, 0.9 * high), max(high, 1e-9))  # ranks within a tenth of one another look alike
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(blocks) :]:
        axes.set_axis_off()
    for axes, (title, table) in zip(grid.flat, blocks, strict=False):
        for (i, line), j in itertools.product(enumerate(table), range(columns)):
            ms = computed.get(line[j], 0.0)
            axes.add_patch(Rectangle((j, i), 0.94, 0.92, color=(0.85, 0.47, 0.1, 0.15 + 0.6 * float(scale(ms)))))
            axes.text(j + 0.47, i + 0.46, f"rank {line[j]}\n{ms:,.1f} ms", ha="center", va="center", size=8)
        axes.set(xlim=(0, columns), ylim=(rows, 0), xlabel=column_axis, ylabel=row_axis)
        axes.set_xticks([j + 0.47 for j in range(columns)], [str(j) for j in range(columns)])
        axes.set_yticks(
            [i + 0.46 for i in range(rows)] if row_axis else [],
            [str(i) for i in range(rows)][: rows if row_axis else 0],
        )
        axes.set_title(title, loc="left", size=9)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.suptitle(f"step {step}: the mesh, and each rank's own compute time", x=0.01, ha="left", size=11)
    return figure


def _name_rows(axes: Axes, shown: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(shown)), [f"rank {rank['rank']}" for rank in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _of(ranks: list[dict[str, Any]]) -> str:
    return f" (the first {MAX_ROWS} of {len(ranks)})" if len(ranks) > MAX_ROWS else ""
