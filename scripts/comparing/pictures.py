"""The pictures of a comparison, by matplotlib: a title that says what it shows, units, one colour a strategy.

Colours are Okabe and Ito's for strategies and Paul Tol's "bright" for kinds: told apart by colour-blind readers.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from train.palette import MEMORY_COLOURS, PART_COLOURS
from train.run_files import number

from . import words
from .figures import MEMORY_KINDS, STATE_KINDS, TIME_PARTS, memory_by_rank, sent_by_axis, state_by_rank, time_parts
from .gate import Group, Row
from .style import (
    AXIS_COLOURS,
    MOST_BARS,
    STYLE,
    WIDTH_IN,
    Colours,
    Picture,
    bars,
    legend,
    stack,
)
from .timelines import timelines


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
    for index, pictures in enumerate(pictures_of(groups), start=1):
        for picture in pictures:
            path = folder / (f"{picture.name}.png" if index == 1 else f"{picture.name}-{index}.png")
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
    figure, axes = bars([row.run.label for row in rows])
    for y, row in enumerate(rows):
        speed = row.figures["tokens_per_s"] or 0.0
        low, high = row.figures["tokens_per_s_ci95_low"], row.figures["tokens_per_s_ci95_high"]
        axes.barh(y, speed, color=colours.colour(row), height=0.7)
        if low is not None and high is not None:
            axes.errorbar(speed, y, xerr=[[speed - low], [high - speed]], color="black", capsize=4, linewidth=1.2)
        axes.annotate(f"{speed:,.0f}", (max(speed, high or 0.0), y), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("tokens/s, all devices together")
    return Picture("throughput", words.speed(group), figure, "Bars: median after warm-up. Whiskers: its 95 % interval.")


def step_time(group: Group, colours: Colours) -> Picture | None:
    """The parts of a sampled step, which add up to it; a mark where the step without the profiler ends."""
    rows = [row for row in group.rows if time_parts(row.run)]
    if not rows:
        return None
    figure, axes = bars([row.run.label for row in rows])
    axes.plot([row.figures["step_ms_p50"] or float("nan") for row in rows], range(len(rows)), "|", color="black",
              markersize=16, markeredgewidth=2, label="median step", zorder=3)  # fmt: skip
    stack(axes, [time_parts(row.run) for row in rows], TIME_PARTS, PART_COLOURS)
    axes.set_xlabel("ms of a step")
    legend(axes)
    ranked = [row for row in words.by_speed(group) if row in rows]
    title = " ".join(words.shares(row) for row in ([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked or rows[:1]))
    note = (
        "Mean of the sampled steps and of the ranks; communication is what no computing hides. "
        "The mark is the median of steps without the profiler."
    )
    return Picture("step-time", title, figure, note)


def memory(group: Group, colours: Colours) -> Picture | None:
    """Each rank's memory by kind: at the peak if every run has a sample of it, else state alone."""
    with_steps = [row for row in group.rows if row.run.steps]
    sampled = all(set(kinds) - set(STATE_KINDS) for row in with_steps for kinds in memory_by_rank(row.run).values())
    of = memory_by_rank if sampled else state_by_rank
    by_run = {row.run.label: ranks for row in with_steps if (ranks := of(row.run))}
    if not by_run:
        return None
    few = sum(map(len, by_run.values())) <= MOST_BARS
    lines: list[tuple[str, dict[str, float]]] = []
    for name, ranks in by_run.items():
        lines += [(name, {}), *_named(ranks, few)]  # the run's name on a line of its own
    figure, axes = bars([name for name, _ in lines], each_in=0.22, wrap=False)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in by_run else "normal")
    stack(axes, [kinds for _, kinds in lines], MEMORY_KINDS, MEMORY_COLOURS)
    axes.set_xlabel("MiB at the peak of a sampled step" if sampled else "MiB of state held between steps")
    legend(axes)
    note = "" if sampled else "No sample of every run: activations and buffers are not in it."
    return Picture("memory", words.memory(group) or "Memory by kind and rank.", figure, note)


def wire(group: Group, colours: Colours) -> Picture | None:
    """What rank 0 sends in a step, by mesh axis."""
    sent = {row.run.label: parts for row in group.rows if (parts := sent_by_axis(row.run))}
    if not sent:
        return None
    names = sorted({axis for parts in sent.values() for axis in parts}, key=lambda axis: (axis.count("."), axis))
    figure, axes = bars(list(sent))
    stack(axes, list(sent.values()), names, AXIS_COLOURS)
    axes.set_xlabel("MiB sent by rank 0 per step (message bytes)")
    legend(axes)
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
        # the first is thick and each next one thinner, so that equal curves all show
        width = 1.2 + 5.0 * (len(rows) - 1 - i) / len(rows)
        curves.plot(*zip(*_losses(row).items(), strict=True), colours.line(row), color=colours.colour(row),
                    linewidth=width, label=row.run.label, solid_capstyle="round")  # fmt: skip
    curves.set_ylabel("training loss")
    legend(curves)
    if distances is not None and reference is not None:
        _distances(distances, [row for row in rows if row is not reference], reference, colours)
    (distances or curves).set_xlabel("step")
    (distances or curves).xaxis.set_major_locator(MaxNLocator(integer=True))
    note = "Below: no mark where two losses are the same to the last bit." if distances is not None else ""
    return Picture("loss", words.losses(group), figure, note)


def _losses(row: Row) -> dict[int, float]:
    """By step; NaN, which is not drawn, where it is not a number."""
    losses = {record["step"]: number(record["train/loss"]) for record in row.run.steps}
    return {step: math.nan if loss is None else loss for step, loss in losses.items()}


def _distances(axes: Axes, rows: list[Row], reference: Row, colours: Colours) -> None:
    """How far each loss is from the reference's, relative; nothing where it is equal, as no logarithm shows 0."""
    theirs = _losses(reference)
    shown: list[float] = []
    for row in rows:
        apart = {n: abs(x - theirs[n]) / abs(theirs[n]) for n, x in _losses(row).items() if theirs.get(n)}
        seen = {n: x for n, x in apart.items() if 0 < x < math.inf}
        axes.plot(list(seen), list(seen.values()), colours.line(row), color=colours.colour(row), marker=".")
        shown += seen.values()
    axes.set(yscale="log", ylabel=f"distance from\n{reference.run.label} (relative)")
    if shown:  # whole decades, so that one at least has a label
        axes.set_ylim(10 ** math.floor(math.log10(min(shown))), 10 ** math.ceil(math.log10(max(shown) * 1.01)))


def _named(ranks: dict[int, dict[str, float]], few: bool) -> list[tuple[str, dict[str, float]]]:
    """All ranks if there are few bars, else those that hold most and least."""
    if few or len(ranks) <= 2:
        return [(f"rank {rank}", kinds) for rank, kinds in ranks.items()]
    ordered = sorted(ranks, key=lambda rank: sum(ranks[rank].values()))
    return [(f"{word}, rank {rank}", ranks[rank]) for word, rank in (("most", ordered[-1]), ("least", ordered[0]))]


def _slug(label: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", label).strip("-")
