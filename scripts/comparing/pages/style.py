"""The style of the pictures of a comparison: colours, horizontal bars, legends and tooltips."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.comparing.gate import Group, Row
from train.record.drawing import MAX_ROWS
from train.record.palette import GREY, strategy_colours
from train.record.run_files import clean

LEGEND_COLUMNS = 3
ABOVE: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3, "borderpad": 0}
LINES = ("-", "--", ":", "-.")
WIDTH_IN, LABEL_CHARS, LINE_CHARS = 5.0, 15, 40  # characters of a label per line if it is wrapped, and if it is not
LEGEND_ROW_IN = 0.17
NOT_DRAWN_WELL = (
    "(Glyph .* missing from font|constrained_layout not applied)"  # warnings for names with rare letters, or too long
)
TIP = "tip: "  # the prefix of a bar's id that contains a tooltip; page.py makes a title from the rest of the id
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "strategy-lab",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,  # names may contain a $
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


@dataclass
class Picture:
    """`name`: the name of its file. `wide`: it needs the full width of the page. `panels`: the same lines as data, for
    an interactive chart; empty if there is no such chart."""

    name: str
    title: str
    figure: Figure
    note: str = ""
    wide: bool = False
    panels: list[dict[str, Any]] = field(default_factory=list)


class Colours:
    """A colour for each strategy, the same in every report, and a line style for each run of the strategy."""

    def __init__(self, groups: list[Group]) -> None:
        runs = [row.run for group in groups for row in group.rows]
        names = sorted({run.strategy for run in runs})
        self.of = strategy_colours(names)
        self.labels = {name: list(dict.fromkeys(r.label for r in runs if r.strategy == name)) for name in names}

    def colour(self, row: Row) -> str:
        return self.of[row.run.strategy]

    def line(self, row: Row) -> str:
        return LINES[self.labels[row.run.strategy].index(row.run.label) % len(LINES)]


def drawable(rows: list[Row]) -> tuple[list[Row], str]:
    """The rows that fit into a picture, and a sentence about the others, if any."""
    left = len(rows) - MAX_ROWS
    return rows[:MAX_ROWS], f" {left} more runs are only in the table." if left > 0 else ""


def legend_in(count: int) -> float:
    """The height that a legend of this many entries needs beyond its first row."""
    return LEGEND_ROW_IN * max(math.ceil(count / LEGEND_COLUMNS) - 1, 0)


def bars(labels: list[str], each_in: float = 0.42, wrap: bool = True) -> tuple[Figure, Axes]:
    """Axes with a labelled row for each horizontal bar, the first at the top."""
    figure = Figure(figsize=(WIDTH_IN, 1.2 + each_in * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(
        range(len(labels)),
        [textwrap.fill(label, LABEL_CHARS) if wrap else clean(label, LINE_CHARS) for label in labels],
    )
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.5", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def stack(
    axes: Axes, rows: list[tuple[str, dict[str, float]]], kinds: Iterable[str], colours: dict[str, str], unit: str
) -> None:
    """Stacked horizontal bars for labelled rows. A kind that no bar has is not in the legend."""
    ends = [0.0] * len(rows)
    for kind in kinds:
        lengths = [max(parts.get(kind, 0.0), 0.0) for _, parts in rows]
        if not any(lengths):
            continue
        hatch = None if kind in colours else "///"
        drawn = axes.barh(range(len(rows)), lengths, left=ends, height=0.75, label=kind, color=colours.get(kind, GREY),
                          hatch=hatch, edgecolor="white" if hatch else "none", linewidth=0)  # fmt: skip
        for patch, (name, _), length in zip(drawn, rows, lengths, strict=True):
            if length:
                patch.set_gid(f"{TIP}{name}, {kind}: {length:,.4g} {unit}")
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    axes.use_sticky_edges = False  # room beyond the longest bar
    axes.set_xlim(left=0)


def legend(axes: Axes) -> None:
    """A legend above the axes, filled row by row."""
    handles, labels = axes.get_legend_handles_labels()
    # matplotlib fills a legend column by column, but people read it row by row
    order = [i for column in range(LEGEND_COLUMNS) for i in range(column, len(labels), LEGEND_COLUMNS)]
    shown = [handles[i] for i in order], [clean(labels[i], LINE_CHARS // 2) for i in order]
    if handles:
        axes.legend(*shown, ncols=LEGEND_COLUMNS, fontsize=8.5, columnspacing=1.0, **ABOVE)
