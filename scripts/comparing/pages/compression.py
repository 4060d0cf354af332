"""Compressed runs in the report: their table, and a picture of the loss against the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from scripts.comparing.pages.style import STYLE, TIP, Picture
from scripts.compressing.table import COLUMNS, METHOD, PARENT, MiB, Row, Table
from train.record.palette import BLUE, GREY, RED

LEFT = ("method", "front")  # columns of words
WIDTH_IN, HEIGHT_IN = 11.0, 4.6
LINE_PX, NEAR_PX = (
    12.0,
    90.0,
)  # the height of a label; labels of points that are nearer than this stand one above another


def sections(tables: Sequence[Table], figure: Callable[[Picture, str], str]) -> list[str]:
    """A section of the page for each table. `figure`: gives a picture as HTML, with ids that begin with a prefix."""
    if not tables:
        return []
    made = [_section(table, figure, f"c{number}") for number, table in enumerate(tables)]
    return [*made, f'<section><p class="notes">{escape(METHOD)}</p></section>']


def _section(table: Table, figure: Callable[[Picture, str], str], prefix: str) -> str:
    titles = "".join(f'<th scope="col"{_align(title)}>{escape(title)}</th>' for title in COLUMNS)
    rows = "\n".join(f"<tr>{''.join(_cells(row))}</tr>" for row in table.rows)
    head = f'<section><h2>Compressed: {escape(table.heading)}</h2>\n<div class="scroll" tabindex="0">'
    body = f"<table><thead><tr>{titles}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>"
    return f"{head}{body}\n{figure(picture(table), prefix)}</section>"


def _align(title: str) -> str:
    return "" if title in LEFT else ' class="number"'


def _cells(row: Row) -> list[str]:
    cells = []
    for title, text in COLUMNS.items():
        kind = " ".join(["number"] * (title not in LEFT) + ["best"] * (title == "front" and row.front))
        tag = "th" if title == "method" else "td"
        scope = ' scope="row"' if tag == "th" else ""
        cells.append(f'<{tag}{scope} class="{kind}">{escape(text(row))}</{tag}>')
    return cells


def picture(table: Table) -> Picture:
    """The loss against the bytes on the disk, with the Pareto front as a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
        axes = figure.subplots()
        places = [((row.mean("bytes") or 0) / MiB, row.mean("loss") or 0.0) for row in table.rows]
        front = sorted(place for row, place in zip(table.rows, places, strict=True) if row.front)
        axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.2, zorder=1)
        for row, (x, y) in zip(table.rows, places, strict=True):
            colour = RED if row.label == PARENT else BLUE if row.front else GREY
            losses = [side.loss for side in row.sides]
            axes.vlines(x, min(losses), max(losses), color=colour, linewidth=1.2)
            (point,) = axes.plot(x, y, "o", color=colour, zorder=3 if row.front else 2)
            point.set_gid(f"{TIP}{row.label}: {x:,.2f} MiB, loss {y:.4f}")
        axes.set(xscale="log", xlabel="MiB on the disk", ylabel="validation loss")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.16, y=0.1)
        axes.grid(color="0.5", alpha=0.25)
        _label(figure, axes, [row.label for row in table.rows], places)
    several = max(len(row.sides) for row in table.rows) > 1
    note = "The line is the Pareto front, in blue." + (" Vertical lines: from the smallest to the largest loss of the "
           "seeds; points: their means." if several else "")  # fmt: skip
    return Picture("compression", _title(table), figure, note, wide=True)


def save(tables: Sequence[Table], file: Path) -> list[Path]:
    """Write the picture of each table; the names of those after the first end in -2, -3 …. Raises OSError and, for an
    ending that matplotlib does not know, ValueError."""
    paths = []
    for number, table in enumerate(tables, start=1):
        made = picture(table)
        path = file if number == 1 else file.with_stem(f"{file.stem}-{number}")
        with matplotlib.rc_context(STYLE):
            made.figure.suptitle(made.title, fontsize=10, x=0.01, ha="left")
            made.figure.savefig(path, dpi=160)
        paths.append(path)
    return paths


def _title(table: Table) -> str:
    """What the smallest model on the front costs."""
    last = min((row for row in table.rows if row.front), key=lambda row: row.mean("bytes") or 0.0)
    whole = next(row for row in table.rows if row.label == PARENT)
    size = f"{100 * (last.ratio('bytes') or 0.0):.1f} % of the parent's bytes"
    return (
        f"The smallest, {last.label}, has {size}, and a loss of {last.mean('loss'):.4f}, not {whole.mean('loss'):.4f}."
    )


def _label(figure: Figure, axes: Axes, labels: Sequence[str], places: Sequence[tuple[float, float]]) -> None:
    """Write the labels beside their points, those of near points one above another."""
    figure.draw_without_rendering()
    pixels = axes.transData.transform(places)
    scale = 72 / figure.dpi
    taken: list[tuple[float, float]] = []
    for place in sorted(range(len(labels)), key=lambda i: pixels[i][1]):
        x, y = pixels[place] * scale
        at = max([y, *(top + LINE_PX for left, top in taken if abs(left - x) < NEAR_PX and top + LINE_PX > y)])
        taken.append((x, at))
        axes.annotate(
            labels[place], places[place], (9, at - y), textcoords="offset points", va="center", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkB": 3},
        )  # fmt: skip
