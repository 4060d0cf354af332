"""Pipeline timelines: a row for each rank, with a bar for each forward and backward of a microbatch. In a gap the rank
waits."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scripts.comparing.gate import Row
from scripts.comparing.pages.style import ABOVE, TIP
from scripts.comparing.table import formatted
from train.record.palette import WORK

WIDTH_IN, MOST_RANKS, MOST_BARS = 11.0, 16, 5000
LEAST_SHARE = 0.014  # the fraction of the step that a bar needs to show the number of its microbatch


def timelines(rows: list[Row]) -> list[tuple[str, str, Figure, str]]:
    """(label, title, figure, note) of each run whose last sample has the timeline of a pipeline."""
    return [made for row in rows if (made := _timeline(row)) is not None]


def _timeline(row: Row) -> tuple[str, str, Figure, str] | None:
    ranks = [
        (r["rank"], [bar for bar in r.get("timeline", []) if bar[0] in WORK]) for r in row.run.sample.get("ranks", [])
    ]
    if len({bar[1] for _, bars in ranks for bar in bars}) < 2:
        return None  # one stage is not a pipeline
    if len(ranks) > MOST_RANKS:  # one rank of each pipeline stage
        ranks = list({tuple(sorted({bar[1] for bar in bars})): (rank, bars) for rank, bars in reversed(ranks)}.values())
        ranks.sort()
    end = max(stop for _, bars in ranks for *_, stop in bars)
    if not end > 0 or sum(len(bars) for _, bars in ranks) > MOST_BARS:
        return None  # there is nothing to draw, or there are too many bars to distinguish
    several = len({bar[1] for _, bars in ranks for bar in bars}) > len(ranks)
    figure = Figure(figsize=(WIDTH_IN, 1.1 + 0.42 * len(ranks)), layout="constrained")
    axes = figure.subplots()
    for y, (rank, bars) in enumerate(ranks):
        for kind, stage, microbatch, start, stop in bars:
            _, colour, ink = WORK[kind]
            (drawn,) = axes.barh(
                y, stop - start, left=start, height=0.8, color=colour, edgecolor="white", linewidth=0.6
            )
            drawn.set_gid(f"{TIP}rank {rank}, {WORK[kind][0]} of microbatch {microbatch}: {stop - start:,.3g} ms")
            text = f"{microbatch}" + (f"·s{stage}" if several else "")
            if stop - start > LEAST_SHARE * end * max(len(text) / 2, 1):
                axes.text((start + stop) / 2, y, text, ha="center", va="center", fontsize=8, color=ink)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank, _ in ranks])
    axes.set(ylim=(len(ranks) - 0.5, -0.5), xlim=(0, end), xlabel="ms since the start of the step")
    used = [kind for kind in WORK if any(bar[0] == kind for _, bars in ranks for bar in bars)]
    patches = [Patch(color=WORK[kind][1], label=f"{kind} {WORK[kind][0]}") for kind in used]
    axes.legend(handles=patches, ncols=4, fontsize=8.5, **ABOVE)
    measured, theory = row.figures["bubble_pct"], row.figures["bubble_theory_pct"]
    bubble = "" if measured is None else f": ranks wait {formatted(measured, 1)} % of the time"
    bubble += "" if measured is None or theory is None else f", the schedule alone explains {formatted(theory, 1)} %"
    note = "Numbers: microbatches" + (" and stages." if several else ".") + " Gaps: the rank waits or sends."
    return row.run.label, f"Pipeline of {row.run.label}{bubble}.", figure, note
