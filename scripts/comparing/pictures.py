"""The pictures of a comparison, by matplotlib: a title that says what it shows, units, one colour a strategy.

Colours are Okabe and Ito's for strategies and Paul Tol's "bright" for kinds: told apart by colour-blind readers.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import words
from .figures import MEMORY_KINDS, STATE_KINDS, TIME_PARTS, memory_by_rank, sent_by_axis, state_by_rank, time_parts
from .gate import Group, Row
from .timelines import timelines

STRATEGY_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#B7A800")
BLUE, CYAN, GREEN, YELLOW = "#4477AA", "#66CCEE", "#228833", "#CCBB44"
RED, PURPLE, GREY = "#EE6677", "#AA3377", "#BBBBBB"
LINES = ("-", "--", ":", "-.")
PART_COLOURS = {"forward": BLUE, "backward": PURPLE, "optimiser": GREEN, "communication": YELLOW, "data": CYAN}
MEMORY_COLOURS = {"parameters": RED, "gradients": PURPLE, "optimiser": GREEN, "activations": BLUE,
                  "communication": YELLOW, "temporary": CYAN}  # fmt: skip
AXIS_COLOURS = {"pp": BLUE, "dp_replicate": GREEN, "dp_shard": RED, "cp": YELLOW, "tp": PURPLE, "ep": CYAN}
WIDTH_IN, MOST_RANKS, LABEL_CHARS = 5.6, 8, 15
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
    """One colour for each strategy, in the order of first appearance; a line style for each run of it."""

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


def pictures_of(groups: list[Group]) -> list[list[Picture]]:
    """Those of each group that its runs have the figures for."""
    with matplotlib.rc_context(STYLE):
        colours = Colours(groups)
        makers: tuple[Callable[[Group, Colours], Picture | None], ...] = (throughput, step_time, memory, wire, loss)
        made = [[maker(group, colours) for maker in makers] for group in groups]
        return [
            [picture for picture in pictures if picture is not None]
            + [Picture(f"timeline-{_slug(name)}", title, figure, note, wide=True)
               for name, title, figure, note in timelines(group.rows)]
            for pictures, group in zip(made, groups, strict=True)
        ]  # fmt: skip


def save_all(groups: list[Group], folder: Path) -> list[Path]:
    """Write every picture as PNG; those of a second table end in -2."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pictures in enumerate(pictures_of(groups), start=1):
        for picture in pictures:
            path = folder / (f"{picture.name}.png" if number == 1 else f"{picture.name}-{number}.png")
            width = int(picture.figure.get_size_inches()[0] * 12.5)
            picture.figure.suptitle(textwrap.fill(picture.title, width), fontsize=10, x=0.01, ha="left")
            picture.figure.savefig(path, dpi=160)
            paths.append(path)
    return paths


def throughput(group: Group, colours: Colours) -> Picture | None:
    """Median tokens/s with its interval."""
    rows = [row for row in group.rows if row.figures["tokens_per_s"] is not None]
    if not rows:
        return None
    figure, axes = _bars(rows, [row.run.label for row in rows])
    for y, row in enumerate(rows):
        speed = row.figures["tokens_per_s"] or 0.0
        low, high = row.figures["tokens_per_s_ci95_low"], row.figures["tokens_per_s_ci95_high"]
        axes.barh(y, speed, color=colours.colour(row), height=0.7)
        if low is not None and high is not None:
            axes.errorbar(speed, y, xerr=[[speed - low], [high - speed]], color="black", capsize=4, linewidth=1.2)
        axes.annotate(f"{speed:,.0f}", (max(speed, high or 0.0), y), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.16)
    axes.set_xlabel("tokens/s, all devices together")
    return Picture("throughput", words.speed(group), figure, "Bars: median after warm-up. Whiskers: its 95 % interval.")


def step_time(group: Group, colours: Colours) -> Picture | None:
    """The parts of a sampled step, which add up to it; a mark where the step without the profiler ends."""
    rows = [row for row in group.rows if time_parts(row.run)]
    if not rows:
        return None
    figure, axes = _bars(rows, [row.run.label for row in rows])
    _stack(axes, [time_parts(row.run) for row in rows], TIME_PARTS, PART_COLOURS)
    axes.plot([row.figures["step_ms_p50"] or float("nan") for row in rows], range(len(rows)), "|", color="black",
              markersize=16, markeredgewidth=2, label="step, not sampled")  # fmt: skip
    axes.set_xlabel("ms of a step")
    _legend(figure, axes)
    ranked = [row for row in words.by_speed(group) if row in rows]
    title = " ".join(words.shares(row) for row in ([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked or rows[:1]))
    note = "Mean of the sampled steps and of the ranks; communication is what no computing hides."
    return Picture("step-time", title, figure, note)


def memory(group: Group, colours: Colours) -> Picture | None:
    """Each rank's memory by kind: at the peak if every run has a sample of it, else state alone."""
    with_steps = [row for row in group.rows if row.run.steps]
    sampled = all(set(kinds) - set(STATE_KINDS) for row in with_steps for kinds in memory_by_rank(row.run).values())
    of = memory_by_rank if sampled else state_by_rank
    bars = [(row, rank, kinds) for row in with_steps for rank, kinds in _shown(of(row.run))]
    if not bars:
        return None
    figure, axes = _bars(bars, [f"{row.run.label} {rank}" for row, rank, _ in bars], each_in=0.2)
    _stack(axes, [kinds for *_, kinds in bars], MEMORY_KINDS, MEMORY_COLOURS)
    axes.set_xlabel("MiB at the peak of a sampled step" if sampled else "MiB of state held between steps")
    axes.set_ylabel("strategy and rank")
    _legend(figure, axes)
    note = "" if sampled else "No sample of every run: activations and buffers are not in it."
    return Picture("memory", words.memory(group) or "Memory by kind and rank.", figure, note)


def wire(group: Group, colours: Colours) -> Picture | None:
    """What rank 0 sends in a step, by mesh axis."""
    sent = {row.run.label: parts for row in group.rows if (parts := sent_by_axis(row.run))}
    if not sent:
        return None
    names = sorted({axis for parts in sent.values() for axis in parts}, key=lambda axis: (axis.count("."), axis))
    figure, axes = _bars(sent, list(sent))
    _stack(axes, list(sent.values()), names, AXIS_COLOURS)
    axes.set_xlabel("MiB sent by rank 0 per step (message bytes)")
    _legend(figure, axes)
    totals = {label: sum(parts.values()) for label, parts in sent.items()}
    most, least = max(totals, key=lambda label: totals[label]), min(totals, key=lambda label: totals[label])
    title = f"{most} sends {totals[most]:.3g} MiB a step" + (
        f", {totals[most] / totals[least]:.3g} times {least}." if totals[least] and most != least else ".")  # fmt: skip
    return Picture("wire", title, figure, "By the mesh axis that the messages run over.")


def loss(group: Group, colours: Colours) -> Picture | None:
    """The training loss over one another, and below it how far each is from the reference."""
    rows = [row for row in group.rows if row.run.steps]
    if not rows:
        return None
    reference = next((row for row in rows if row.equal == "reference"), None)
    figure = Figure(figsize=(WIDTH_IN, 3.9 if reference and len(rows) > 1 else 2.8), layout="constrained")
    if reference and len(rows) > 1:
        curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    else:
        curves, distances = figure.subplots(), None
    for i, row in enumerate(rows):
        steps = {record["step"]: record["train/loss"] for record in row.run.steps}
        # the first is thick and each next one thinner, so that equal curves all show
        width = 1.2 + 5.0 * (len(rows) - 1 - i) / len(rows)
        curves.plot(steps.keys(), steps.values(), colours.line(row), color=colours.colour(row), linewidth=width,
                    label=row.run.label, solid_capstyle="round")  # fmt: skip
        if distances is not None and reference is not None and row is not reference:
            theirs = {record["step"]: record["train/loss"] for record in reference.run.steps}
            apart = {n: abs(x - theirs[n]) / abs(theirs[n]) for n, x in steps.items() if theirs.get(n)}
            seen = {n: x for n, x in apart.items() if x > 0}
            distances.plot(seen.keys(), seen.values(), colours.line(row), color=colours.colour(row), marker=".")
    curves.set_ylabel("training loss")
    _legend(figure, curves)
    if distances is not None and reference is not None:
        distances.set(yscale="log", ylabel=f"distance from\n{reference.run.label} (relative)")
    (distances or curves).set_xlabel("step")
    note = "Below: no mark where two losses are the same to the last bit." if distances is not None else ""
    return Picture("loss", words.losses(group), figure, note)


def _bars(of: Iterable[object], labels: list[str], each_in: float = 0.42) -> tuple[Figure, Axes]:
    """Axes with a named place for each horizontal bar, the first on top."""
    figure = Figure(figsize=(WIDTH_IN, 1.2 + each_in * max(len(labels), 2)), layout="constrained")
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, LABEL_CHARS) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="0.5", alpha=0.25)
    axes.set_axisbelow(True)
    return figure, axes


def _stack(axes: Axes, bars: list[dict[str, float]], kinds: Iterable[str], colours: dict[str, str]) -> None:
    """Stacked horizontal bars; a kind that no bar has is not in the legend."""
    ends = [0.0] * len(bars)
    for kind in kinds:
        lengths = [bar.get(kind, 0.0) for bar in bars]
        if not any(lengths):
            continue
        hatch = None if kind in colours else "///"
        axes.barh(range(len(bars)), lengths, left=ends, height=0.75, label=kind, color=colours.get(kind, GREY),
                  hatch=hatch, edgecolor="white" if hatch else "none", linewidth=0)  # fmt: skip
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=8.5, columnspacing=1.0)


def _shown(ranks: dict[int, dict[str, float]]) -> list[tuple[str, dict[str, float]]]:
    """All ranks if they are few, else those that hold most and least."""
    if len(ranks) <= MOST_RANKS:
        return [(f"rank {rank}", kinds) for rank, kinds in ranks.items()]
    ordered = sorted(ranks, key=lambda rank: sum(ranks[rank].values()))
    return [(f"{word} (rank {rank})", ranks[rank]) for word, rank in (("most", ordered[-1]), ("least", ordered[0]))]


def _slug(label: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", label).strip("-")
