"""The pictures of a comparison, drawn with matplotlib. Each title says what its picture shows."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path

import matplotlib

from scripts.comparing import words
from scripts.comparing.gate import Group
from scripts.comparing.pages.curves import loss, loss_over_bytes, loss_over_time
from scripts.comparing.pages.style import NOT_DRAWN_WELL, STYLE, TIP, Colours, Picture, bars, drawable, legend, stack
from scripts.comparing.pages.timelines import timelines
from scripts.comparing.results import memory_by_rank, sent_by_axis, state_of_ranks, time_parts
from train.measure.results import MEMORY_KINDS, STATE_KINDS, TIME_PARTS
from train.record.drawing import MAX_ROWS
from train.record.palette import AXIS_COLOURS, MEMORY_COLOURS, PART_COLOURS


def pictures_of(groups: list[Group]) -> list[list[Picture]]:
    """The pictures of each group, as far as its runs have the figures."""
    with matplotlib.rc_context(STYLE):
        colours = Colours(groups)
        makers: tuple[Callable[[Group, Colours], Picture | None], ...] = (
            throughput, loss, step_time, memory, wire, loss_over_time, loss_over_bytes,
        )  # fmt: skip
        made = [[maker(group, colours) for maker in makers] for group in groups]
        return [
            [picture for picture in pictures if picture is not None]
            + [Picture(f"timeline-{_slug(name)}", title, figure, note, wide=True)
               for name, title, figure, note in timelines(group.rows)]
            for pictures, group in zip(made, groups, strict=True)
        ]  # fmt: skip


def save_all(groups: list[Group], folder: Path) -> list[Path]:
    """Write every picture as a PNG file. The names of those of a second table end in -2."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOT_DRAWN_WELL)
        for number, pictures in enumerate(pictures_of(groups), start=1):
            for picture in pictures:
                path = folder / (f"{picture.name}.png" if number == 1 else f"{picture.name}-{number}.png")
                width = int(picture.figure.get_size_inches()[0] * 12.5)
                picture.figure.suptitle(textwrap.fill(picture.title, width), fontsize=10, x=0.01, ha="left")
                picture.figure.savefig(path, dpi=160)
                paths.append(path)
    return paths


def throughput(group: Group, colours: Colours) -> Picture | None:
    """The median tokens/s with its interval."""
    rows, more = drawable([row for row in group.rows if (row.figures["tokens_per_s"] or 0.0) > 0])
    if not rows:
        return None
    figure, axes = bars([row.run.label for row in rows])
    for y, row in enumerate(rows):
        speed = row.figures["tokens_per_s"] or 0.0
        low, high = row.figures["tokens_per_s_ci95_low"], row.figures["tokens_per_s_ci95_high"]
        (bar,) = axes.barh(y, speed, color=colours.colour(row), height=0.7)
        bar.set_gid(f"{TIP}{row.run.label}: {speed:,.0f} tokens/s")
        if low is not None and high is not None:
            axes.errorbar(speed, y, xerr=[[speed - low], [high - speed]], color="black", capsize=4, linewidth=1.2)
        axes.annotate(f"{speed:,.0f}", (max(speed, high or 0.0), y), (5, 0), textcoords="offset points", va="center")
    axes.margins(x=0.18)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("tokens/s, all devices together")
    return Picture(
        "throughput", words.speed(group), figure, f"Bars: median after warm-up. Whiskers: its 95 % interval.{more}"
    )


def step_time(group: Group, colours: Colours) -> Picture | None:
    """The time of the median step, divided into parts in the same proportions as the recorded steps."""
    medians = {id(row): row.figures["step_ms_p50"] or 0.0 for row in group.rows}
    rows, more = drawable([row for row in group.rows if sum(time_parts(row.run).values()) > 0 < medians[id(row)]])
    if not rows:
        return None
    figure, axes = bars([row.run.label for row in rows])
    scaled, slower = [], []
    for row in rows:
        parts = time_parts(row.run)
        recorded = sum(parts.values())
        slower.append(recorded / medians[id(row)])
        scaled.append((row.run.label, {part: ms * medians[id(row)] / recorded for part, ms in parts.items()}))
    stack(axes, scaled, TIME_PARTS, PART_COLOURS, "ms")
    axes.set_xlabel("ms of the median step")
    legend(axes)
    ranked = [row for row in words.by_speed(group) if row in rows]
    title = " ".join(words.shares(row) for row in ([ranked[0], ranked[-1]] if len(ranked) > 1 else ranked or rows[:1]))
    took = " to ".join(dict.fromkeys(f"{factor:.2g}" for factor in (min(slower), max(slower))))
    note = (
        "A bar is as long as the median step, which is not recorded. It is divided in the proportions of the recorded "
        f"steps; these took {took} times as long. Values are means over ranks; communication is only the exposed part, "
        f"which does not overlap with computation.{more}"
    )
    return Picture("step-time", title, figure, note)


def memory(group: Group, colours: Colours) -> Picture | None:
    """The memory of each rank by kind: at the peak if every run has a sample, else the state between steps."""
    with_steps, more = drawable([row for row in group.rows if row.run.steps])
    sampled = all(set(kinds) - set(STATE_KINDS) for row in with_steps for kinds in memory_by_rank(row.run).values())
    of = memory_by_rank if sampled else state_of_ranks
    by_run = {row.run.label: ranks for row in with_steps if (ranks := of(row.run))}
    if not by_run:
        return None
    few = sum(map(len, by_run.values())) <= MAX_ROWS
    lines: list[tuple[str, dict[str, float]]] = []
    for name, ranks in by_run.items():
        lines += [(name, {}), *_named(ranks, few)]  # the name of the run has its own line
    figure, axes = bars([name for name, _ in lines], each_in=0.22, wrap=False)
    for text in axes.get_yticklabels():
        text.set_fontweight("bold" if text.get_text() in by_run else "normal")
    owners = [name for name, ranks in by_run.items() for _ in range(1 + len(_named(ranks, few)))]
    named = [(f"{owner}, {name}", kinds) for owner, (name, kinds) in zip(owners, lines, strict=True)]
    stack(axes, named, MEMORY_KINDS, MEMORY_COLOURS, "MiB")
    axes.set_xlabel("MiB at the peak of a sampled step" if sampled else "MiB of state held between steps")
    legend(axes)
    note = ("" if sampled else "Not every run has a sample, so activations and buffers are not shown.") + more
    return Picture("memory", words.memory(group) or "Memory by kind and rank.", figure, note)


def wire(group: Group, colours: Colours) -> Picture | None:
    """The bytes that rank 0 sends in a step, by mesh axis."""
    rows, more = drawable([row for row in group.rows if sum(sent_by_axis(row.run).values()) > 0])
    sent = {row.run.label: sent_by_axis(row.run) for row in rows}
    if not sent:
        return None
    names = sorted({axis for parts in sent.values() for axis in parts}, key=lambda axis: (axis.count("."), axis))
    figure, axes = bars(list(sent))
    stack(axes, list(sent.items()), names, AXIS_COLOURS, "MiB")
    axes.set_xlabel("MiB sent by rank 0 per step (message bytes)")
    legend(axes)
    totals = {label: sum(parts.values()) for label, parts in sent.items()}
    most, least = max(totals, key=lambda label: totals[label]), min(totals, key=lambda label: totals[label])
    title = f"{most} sends {totals[most]:.3g} MiB a step" + (
        f", {totals[most] / totals[least]:.3g} times {least}." if totals[least] and most != least else ".")  # fmt: skip
    return Picture("wire", title, figure, f"By the mesh axis that the messages run over.{more}")


def _named(ranks: dict[int, dict[str, float]], few: bool) -> list[tuple[str, dict[str, float]]]:
    """All ranks if there are few bars, else the two with the most and the least memory."""
    if few or len(ranks) <= 2:
        return [(f"rank {rank}", kinds) for rank, kinds in ranks.items()]
    ordered = sorted(ranks, key=lambda rank: sum(ranks[rank].values()))
    return [(f"{word}, rank {rank}", ranks[rank]) for word, rank in (("most", ordered[-1]), ("least", ordered[0]))]


def _slug(label: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.]+", "-", label).strip("-")
