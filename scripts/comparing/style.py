"""How the pictures of a comparison look: colours, horizontal bars, legends.

Colours are Okabe and Ito's for strategies and Paul Tol's "bright" for kinds: told apart by colour-blind readers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.palette import BLUE, CYAN, GREEN, GREY, PURPLE, RED, YELLOW

from .gate import Group, Row

STRATEGY_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#B7A800")
LEGEND_COLUMNS = 3
ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "borderpad": 0}
LINES = ("-", "--", ":", "-.")
AXIS_COLOURS = {"pp": BLUE, "dp_replicate": GREEN, "dp_shard": RED, "cp": YELLOW, "tp": PURPLE, "ep": CYAN}
WIDTH_IN, MOST_BARS, LABEL_CHARS = 5.0, 32, 15
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "strategy-lab",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass
class Picture:
    """`name` is a file's; `wide` is for pictures that cannot be read when narrow."""

    name: str
    title: str
    figure: Figure
    note: str = ""
    wide: bool = False


class Colours:
    """One colour for each strategy, in the order of the directories; a line style for each run of it."""

    def __init__(self, groups: list[Group]) -> None:
        runs = [row.run for group in groups for row in group.rows]
        self.order = list(dict.fromkeys(run.strategy for run in sorted(runs, key=lambda run: run.path.name)))
        self.labels = {s: list(dict.fromkeys(run.label for run in runs if run.strategy == s)) for s in self.order}

    def colour(self, row: Row) -> str:
        return STRATEGY_COLOURS[self.order.index(row.run.strategy) % len(STRATEGY_COLOURS)]

    def line(self, row: Row) -> str:
        place = self.order.index(row.run.strategy)
        repeat = place // len(STRATEGY_COLOURS) + self.labels[row.run.strategy].index(row.run.label)
        return LINES[repeat % len(LINES)]


def bars(labels: list[str], each_in: float = 0.42, wrap: bool = True) -> tuple[Figure, Axes]:
    """Axes with a named place for each horizontal bar, the first on top."""
    figure = Figure(figsize=(WIDTH_IN, 1.2 + each_in * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, LABEL_CHARS) if wrap else label for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.5", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def stack(axes: Axes, rows: list[dict[str, float]], kinds: Iterable[str], colours: dict[str, str]) -> None:
    """Stacked horizontal bars from 0; a kind that no bar has is not in the legend."""
    ends = [0.0] * len(rows)
    for kind in kinds:
        lengths = [row.get(kind, 0.0) for row in rows]
        if not any(lengths):
            continue
        hatch = None if kind in colours else "///"
        axes.barh(range(len(rows)), lengths, left=ends, height=0.75, label=kind, color=colours.get(kind, GREY),
                  hatch=hatch, edgecolor="white" if hatch else "none", linewidth=0)  # fmt: skip
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.use_sticky_edges = False  # room beyond the longest bar
    axes.set_xlim(left=0)


def legend(axes: Axes) -> None:
    """Above the axes, in rows."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib fills columns, readers read rows
    order = [i for column in range(LEGEND_COLUMNS) for i in range(column, len(labels), LEGEND_COLUMNS)]
    shown = [handles[i] for i in order], [labels[i] for i in order]
    axes.legend(*shown, ncols=LEGEND_COLUMNS, fontsize=8.5, columnspacing=1.0, **ABOVE)
