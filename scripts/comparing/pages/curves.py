"""Curves of the training loss over steps, time and bytes sent, as pictures and as data.

The data (`Picture.panels`) is for the interactive charts of the report. Both show the same lines.
"""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from scripts.comparing import words
from scripts.comparing.gate import Group, Row
from scripts.comparing.pages.style import WIDTH_IN, Colours, Picture, drawable, legend, legend_in
from scripts.comparing.results import sent_by_axis
from train.measure.results import LOSS

MOST_POINTS = 1000  # of a line in the report; more points could not be seen
Line = tuple[list[float], list[float]]  # x, y


def loss(group: Group, colours: Colours) -> Picture | None:
    """The training losses in one picture, and below them the distance of each from the reference."""
    lines = {id(row): _line(list(losses(row)), list(losses(row).values())) for row in group.rows}
    rows, more = drawable([row for row in group.rows if lines[id(row)][0]])
    if not rows:
        return None
    reference = next((row for row in rows if row.equal == "reference"), None)
    others = [row for row in rows if row is not reference] if reference else []
    apart = {id(row): _apart(row, reference) for row in others} if reference else {}
    figure = Figure(figsize=(WIDTH_IN, (3.9 if others else 2.8) + legend_in(len(rows))), layout="constrained")
    if others and reference:
        curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    else:
        curves, distances = figure.subplots(), None
    panels = [_draw(curves, rows, lines, colours, "training loss")]
    legend(curves)
    if distances is not None and reference is not None:
        what = "relative distance"
        panels.append(_draw(distances, others, apart, colours, what, log=True))
        shown = [y for _, ys in apart.values() for y in ys]
        distances.set(yscale="log", ylabel=f"distance from\n{reference.run.label} (relative)")
        distances.yaxis.set_major_formatter(lambda y, _: f"{y:.0e}")  # matplotlib's own needs mathematical text
        distances.yaxis.set_minor_formatter(NullFormatter())
        if shown:  # whole decades, so that at least one of them has a label
            distances.set_ylim(10 ** math.floor(math.log10(min(shown))), 10 ** math.ceil(math.log10(max(shown) * 1.01)))
        else:
            panels.pop()
    (distances or curves).set_xlabel("step")
    (distances or curves).xaxis.set_major_locator(MaxNLocator(integer=True))
    note = "Below: there is no mark if two losses are bitwise equal." if distances is not None else ""
    return Picture("loss", words.losses(group), figure, note + more, panels=[panel | {"x": "step"} for panel in panels])


def loss_over_time(group: Group, colours: Colours) -> Picture | None:
    """The training loss over the seconds since the start of the first step."""
    lines = {id(row): _line(*_timed(row)) for row in group.rows}
    note = "Time on the clock of rank 0, including evaluations and recorded steps, but not the start of the run."
    return _over("loss-time", group, lines, colours, "seconds", "s", note)


def loss_over_bytes(group: Group, colours: Colours) -> Picture | None:
    """The training loss over the bytes that rank 0 has sent."""
    lines = {}
    for row in group.rows:
        sent = sum(sent_by_axis(row.run).values())
        lines[id(row)] = _line([n * sent for n in losses(row)], list(losses(row).values())) if sent else ([], [])
    quiet = [row.run.label for row in group.rows if row.run.steps and not lines[id(row)][0]]
    note = "Message bytes of one counted step, multiplied by the number of steps."
    note += f" {words.listed(quiet)}: nothing was sent, or it was not counted." if quiet else ""
    return _over("loss-bytes", group, lines, colours, "MiB sent by rank 0", "MiB", note)


def _over(
    name: str, group: Group, lines: dict[int, Line], colours: Colours, x: str, unit: str, note: str
) -> Picture | None:
    rows, more = drawable([row for row in group.rows if lines[id(row)][0]])
    if len(rows) < 2:
        return None  # one line has no other to be compared with
    figure = Figure(figsize=(WIDTH_IN, 2.8 + legend_in(len(rows))), layout="constrained")
    axes = figure.subplots()
    panel = _draw(axes, rows, lines, colours, "training loss")
    axes.set_xlabel(x)
    legend(axes)
    return Picture(name, _race(rows, lines, unit), figure, note + more, panels=[panel | {"x": x}])


def _race(rows: list[Row], lines: dict[int, Line], unit: str) -> str:
    """A sentence that compares the losses at the place where the first line ends."""
    first = min(rows, key=lambda row: lines[id(row)][0][-1])
    end = lines[id(first)][0][-1]
    reached = {}
    for row in rows:
        come = [y for x, y in zip(*lines[id(row)], strict=True) if x <= end]
        reached[row.run.label] = come[-1] if come else None
    last = max((row for row in rows if row is not first), key=lambda row: reached[row.run.label] or math.inf)
    there = reached[last.run.label]
    behind = "has not finished a step" if there is None else f"has a loss of {there:.3g}"
    ends = f"{first.run.label} ends with a loss of {reached[first.run.label]:.3g}"
    return f"At {end:.3g} {unit} {ends}; {last.run.label} {behind}."


def losses(row: Row) -> dict[int, float]:
    """The losses by step. A step whose loss is not a finite number is left out."""
    return {record["step"]: record[LOSS] for record in row.run.steps if record[LOSS] is not None}


def _timed(row: Row) -> Line:
    steps = [r for r in row.run.steps if "time" in r and r[LOSS] is not None]
    if not steps:
        return [], []
    start = steps[0]["time"] - (steps[0].get("perf/step_ms") or 0.0) / 1e3
    return [record["time"] - start for record in steps], [record[LOSS] for record in steps]


def _apart(row: Row, reference: Row) -> Line:
    """The relative distance of the loss from the reference. Steps with equal losses have no point, because a
    logarithmic axis cannot show 0."""
    theirs = losses(reference)
    apart = {n: abs(x - theirs[n]) / abs(theirs[n]) for n, x in losses(row).items() if theirs.get(n)}
    seen = {n: x for n, x in apart.items() if 0 < x < math.inf}
    return _line(list(seen), list(seen.values()))


def _line(xs: list[Any], ys: list[float]) -> Line:
    """A line of at most about MOST_POINTS points, including the first and the last."""
    every = math.ceil(len(xs) / MOST_POINTS) or 1
    kept = [i for i in range(len(xs)) if i % every == 0 or i == len(xs) - 1]
    return [float(xs[i]) for i in kept], [ys[i] for i in kept]


def _draw(
    axes: Axes, rows: list[Row], lines: dict[int, Line], colours: Colours, what: str, *, log: bool = False
) -> dict[str, Any]:
    """Draw the lines, and return them as data. The first line is thick and each next one thinner, so that equal curves
    are all visible."""
    axes.set_ylabel(what)
    series = []
    for i, row in enumerate(rows):
        xs, ys = lines[id(row)]
        width = 1.2 if log else 1.2 + 5.0 * (len(rows) - 1 - i) / len(rows)
        dash, colour = colours.line(row), colours.colour(row)
        (drawn,) = axes.plot(
            xs, ys, dash, color=colour, linewidth=width, solid_capstyle="round", marker="." if log else ""
        )
        drawn.set_label(row.run.label)
        series.append({"name": row.run.label, "colour": colour, "dash": dash, "width": width, "x": xs, "y": ys})
    return {"y": what, "log": log, "series": series}
