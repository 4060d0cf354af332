"""Pictures of a sampled step: what each rank did at which time, its memory at the peak, and its place in the mesh.

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

from train.measure.results import COMPUTE_PARTS
from train.record.drawing import MAX_ROWS, mesh_blocks
from train.record.palette import GREY, MEMORY_COLOURS, WORK
from train.record.tags import WHY_PICTURES

# TensorBoard shows a picture 350 pixels wide. It leaves out pixels of a wider one, which makes text hard to read.
WIDTH, DPI = 3.5, 100  # inches and dots per inch
SMALL, NORMAL = 7.0, 8.0  # points
MEMORY = MEMORY_COLOURS | {"untracked": GREY}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": SMALL, "handlelength": 1.0, "handletextpad": 0.4,
                          "columnspacing": 1.0}  # fmt: skip


def draw_sample(sample: dict[str, Any], degrees: dict[str, int] | None = None) -> dict[str, Figure]:
    """Pictures by tag. `degrees`: those of every axis of the mesh; without them there is no picture of the mesh."""
    ranks = sample["ranks"]
    drawn = {"timeline": timeline(sample["step"], ranks), "memory": memory(sample["step"], ranks)}
    if degrees is not None:
        drawn["mesh"] = mesh(sample["step"], ranks, degrees)
    return {f"{WHY_PICTURES}{name}": figure for name, figure in drawn.items() if figure is not None}


def timeline(step: int, ranks: list[dict[str, Any]]) -> Figure | None:
    """A row for each rank, with a bar for each piece of work. A bar shows the number of its microbatch if it fits."""
    shown = ranks[:MAX_ROWS]
    pieces = [piece for rank in shown for piece in rank["timeline"]]
    if not pieces:
        return None
    end = scale_end(max(max(piece[4] for piece in pieces), max(rank["step_ms"] for rank in shown)))
    several = len({(index, piece[1]) for index, rank in enumerate(shown) for piece in rank["timeline"]}) > len(shown)
    figure, (axes,) = _figure(f"step {step}: what each rank did{_of(ranks)}", [0.35 + 0.25 * len(shown)])
    for row, rank in enumerate(shown):
        first = min((piece[1] for piece in rank["timeline"]), default=0)
        for kind, stage, microbatch, start, stop in rank["timeline"]:
            _, colour, ink = WORK[kind]
            # a rank's second stage is a lighter shade of the same colour
            alpha = 0.55 if several and stage != first else 1.0
            axes.barh(row, stop - start, left=start, height=0.8, color=colour, alpha=alpha, edgecolor="white", lw=0.3)
            if stop - start > 0.035 * end:
                axes.text((start + stop) / 2, row, str(microbatch), ha="center", va="center", color=ink, size=SMALL)
    did = {piece[0] for piece in pieces}
    patches = [Patch(color=colour, label=label) for kind, (label, colour, _) in WORK.items() if kind in did]
    axes.set(xlim=(0, end))
    axes.set_xlabel("ms from the start of the step; blank: the rank waits", size=SMALL)
    figure.legend(handles=patches, loc="outside lower left", ncols=2 if len(patches) > 3 else 3, **LEGEND)
    _name_rows(axes, shown)
    return figure


def memory(step: int, ranks: list[dict[str, Any]]) -> Figure | None:
    """The memory of each rank at its peak, by kind, and below it the total over the time of the step, if it was
    sampled. Both have the same scale."""
    shown = [rank for rank in ranks[:MAX_ROWS] if rank["memory"]["at_peak_mib"]]
    curves = [rank for rank in shown if rank["memory"]["curve"]]
    if not shown:
        return None
    heights = [0.35 + 0.22 * len(shown), 1.3][: 2 if curves else 1]
    figure, (bars, *rest) = _figure(f"step {step}: memory by kind at each rank's peak{_of(ranks)}", heights)
    ends = [0.0] * len(shown)
    for kind, colour in MEMORY.items():
        sizes = [rank["memory"]["at_peak_mib"].get(kind, 0.0) for rank in shown]
        if any(sizes):
            bars.barh(range(len(shown)), sizes, left=ends, height=0.8, color=colour, label=kind)
        ends = [a + b for a, b in zip(ends, sizes, strict=True)]
    for row, size in enumerate(ends):
        bars.text(size, row, f" {size:,.1f}", va="center", size=SMALL)
    end = scale_end(1.15 * max(ends))
    bars.set(xlim=(0, end))
    bars.set_xlabel("MiB", size=SMALL)
    _name_rows(bars, shown)
    for axes in rest:
        largest = max(curves, key=lambda rank: max(mib for _, mib in rank["memory"]["curve"]))
        for rank in sorted(curves, key=lambda rank: rank is largest):
            style: dict[str, Any] = {"color": "0.7", "lw": 0.8}
            if rank is largest:
                largest_of = "the largest" if len(curves) == len(ranks) else "the largest of these"
                label = f"rank {rank['rank']}, {largest_of}; grey: the others"
                style = {"color": "black", "lw": 1.0, "label": label}
            axes.step(*zip(*rank["memory"]["curve"], strict=True), where="post", **style)
        axes.set(xlim=(0, scale_end(max(ms for rank in curves for ms, _ in rank["memory"]["curve"]))), ylim=(0, end))
        axes.set_xlabel("ms from the start of the step", size=SMALL)
        axes.set_ylabel("MiB", size=SMALL)
        axes.legend(loc="upper left", borderpad=0, **LEGEND)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside lower left", ncols=4, **LEGEND)
    return figure


def scale_end(largest: float) -> float:
    """1, 2 or 5 times a power of ten, so that the steps of a run, and runs of similar size, have the same scale."""
    power = 10.0 ** math.floor(math.log10(largest)) if largest > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= largest or factor == 10)


def mesh(step: int, ranks: list[dict[str, Any]], degrees: dict[str, int]) -> Figure:
    """The place of each rank in the mesh, and how long it computed: the slowest rank is the darkest."""
    computed = {
        rank["rank"]: sum(ms for part, ms in rank["parts_ms"].items() if part in COMPUTE_PARTS) for rank in ranks
    }
    row_axis, column_axis, blocks = mesh_blocks(degrees)
    blocks = blocks[:MAX_ROWS]
    rows, columns = len(blocks[0][1]), len(blocks[0][1][0])
    across = min(len(blocks), max(4 // columns, 1))
    down = math.ceil(len(blocks) / across)
    figure = Figure(figsize=(WIDTH, 0.6 + down * (0.35 + 0.35 * rows)), dpi=DPI, layout="constrained")
    low, high = min(computed.values()), max(computed.values())
    scale = Normalize(min(low, 0.9 * high), max(high, 1e-9))  # ranks whose times differ by under 10 % look similar
    grid = figure.subplots(down, across, squeeze=False)
    for axes in grid.flat[len(blocks) :]:
        axes.set_axis_off()
    for axes, (title, table) in zip(grid.flat, blocks, strict=False):
        for (i, line), j in itertools.product(enumerate(table), range(columns)):
            ms = computed.get(line[j], 0.0)
            axes.add_patch(Rectangle((j, i), 0.94, 0.92, color=(0, 0, 0, 0.05 + 0.3 * float(scale(ms)))))
            axes.text(j + 0.47, i + 0.46, f"rank {line[j]}\n{ms:,.0f} ms", ha="center", va="center", size=SMALL)
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_xlabel(column_axis, size=SMALL)
        axes.set_ylabel(row_axis, size=SMALL)
        axes.set_xticks([j + 0.47 for j in range(columns)], [str(j) for j in range(columns)])
        axes.set_yticks(
            [i + 0.46 for i in range(rows)] if row_axis else [],
            [str(i) for i in range(rows)][: rows if row_axis else 0],
        )
        axes.set_title(title, loc="left", size=SMALL)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=SMALL)
    figure.suptitle(f"step {step}: how long each rank computed", x=0.01, ha="left", size=NORMAL)
    return figure


def _figure(title: str, heights: list[float]) -> tuple[Figure, list[Axes]]:
    """A figure with axes of these heights (in inches), one above the other, with room for a title and a legend."""
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", size=NORMAL)
    return figure, list(grid.flat)


def _name_rows(axes: Axes, shown: list[dict[str, Any]]) -> None:
    axes.set_yticks(range(len(shown)), [f"rank {rank['rank']}" for rank in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)


def _of(ranks: list[dict[str, Any]]) -> str:
    return f" (the first {MAX_ROWS} of {len(ranks)})" if len(ranks) > MAX_ROWS else ""
