"""Score the planner against runs that others published: python scripts/score_planner.py docs/data/published_runs.csv

Prints, by source, GPU and regime, the error |log(predicted / measured)| of tokens/s with the constants fitted to all
other sources, beside a null model; then how well the planner chooses among layouts; then the error of the peak of memory,
which has no fitted constants. It takes any file with these columns. --fit also writes the constants that fit all
sources to configs/planner.yaml, and the intervals of their errors to configs/planner_intervals.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.scoring import memory
from scripts.scoring.fitting import Point, errors, fitted
from scripts.scoring.jobs import job_of
from scripts.scoring.rows import Row, read
from scripts.scoring.scores import Scored, choices, interval, mean_of_sources, null_speed, summary
from train.command.planning import constants, intervals
from train.command.planning.intervals import SPREAD
from train.command.planning.quantities import quantities
from train.command.process.exits import reported_once
from train.config.world import World

ENOUGH_SOURCES = 5
FEWEST_SOURCES = 3  # of a regime whose interval is written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a CSV file with the columns of docs/data/published_runs.csv")
    parser.add_argument("--fit", action="store_true", help="write the constants that fit all sources")
    args = parser.parse_args()
    with reported_once(World.single()):
        rows = read(args.runs)
        scored = with_intervals(held_out([row for row in rows if row.tokens_per_s]))
        print("\n".join([*by_group(scored), "", *bars(scored), "", *choosing(scored), "", *memory.lines(rows)]))
        if args.fit:
            write(fitted([*map(point, (one for one in scored if one.row.in_bar and one.quantities))]))
            write_intervals(scored)


def point(one: Scored) -> Point:
    assert one.quantities is not None
    return Point(one.quantities, one.measured, one.row.source)


def held_out(rows: Sequence[Row]) -> list[Scored]:
    """Every row, predicted with constants that were fitted to the other sources' rows of the promised kind."""
    found = []
    for row in rows:
        job = job_of(row)
        assert row.tokens_per_s is not None
        found.append(Scored(row, quantities(job) if job else None, 0.0, row.tokens_per_s, np.nan))
    scored = []
    for source in dict.fromkeys(row.source for row in rows):
        others = [one for one in found if one.row.source != source]
        c = fitted([point(one) for one in others if one.row.in_bar and one.quantities])
        for one in found:
            if one.row.source == source and one.quantities is not None:
                predicted = one.measured * float(np.exp(errors([point(one)], c)[0]))
                null = null_speed(one.quantities, others) if others else np.nan
                scored.append(dataclasses.replace(one, predicted=predicted, null=null))
            elif one.row.source == source:
                scored.append(one)
    return scored


def with_intervals(scored: Sequence[Scored]) -> list[Scored]:
    """The rows with the interval that the other sources' held-out errors give: in the same regime, if enough sources
    have it, as the rows of one source err alike."""
    found = []
    for one in scored:
        others = [other for other in scored if other.row.in_bar and other.row.source != one.row.source]
        same = [other for other in others if other.row.regimes[0] == one.row.regimes[0]]
        if len({other.row.source for other in same}) < ENOUGH_SOURCES:
            same = others
        low, high = interval([(other.row.source, -other.error) for other in same])
        found.append(dataclasses.replace(one, low=low, high=high))
    return found


def by_group(scored: Sequence[Scored]) -> list[str]:
    groups: dict[str, list[Scored]] = defaultdict(list)
    for one in scored:
        for regime in one.row.regimes:
            groups[f"{one.row.source} | {one.row.cells['gpu']} | {regime}"].append(one)
            groups[f"all sources | {regime}"].append(one)
    width = max(map(len, groups))
    lines = [f"{'error of tokens/s in %, held out by source':<{width}}   rows    mean  median     p90    bias    null"]
    for name, group in sorted(groups.items()):
        lines.append(f"{name:<{width}}  {summary(one.error for one in group)} {null_mean(group):>7.1f}")
    return lines


def bars(scored: Sequence[Scored]) -> list[str]:
    promised = [one for one in scored if one.row.in_bar]
    groups = {
        "A100 and H100, 16 bits or not stated": promised,
        "  of them over several nodes with TP or PP": [one for one in promised if one.row.regimes[0] == SPREAD],
        "  of them without a defaulted cell": [one for one in promised if not one.row.defaulted],
    }
    lines = [f"{'promised':<42}   rows    mean  median     p90    bias    null  mean of sources"]
    for name, group in groups.items():
        if group:
            both = f"{null_mean(group):>7.1f} {100 * mean_of_sources(group):>16.1f}"
            lines.append(f"{name:<42}  {summary(one.error for one in group)} {both}")
    inside = 100 * np.mean([one.inside for one in promised]) if promised else np.nan
    return [*lines, f"the truth is inside the 80 % interval in {inside:.0f} % of these rows"]


def null_mean(group: Sequence[Scored]) -> float:
    """The null model's mean error in %, over the rows that are predicted."""
    found = [abs(one.null_error) for one in group if one.quantities]
    return 100 * float(np.mean(found)) if found else float("nan")


def choosing(scored: Sequence[Scored]) -> list[str]:
    found = choices(scored)
    if not found:
        return ["no family of three layouts or more"]
    regrets, random = [one.regret for one in found], [one.random_regret for one in found]
    taus = [one.tau for one in found if one.tau is not None]
    return [
        f"choice of a layout in {len(found)} families of {sum(one.layouts for one in found)} layouts",
        f"  regret in %: median {100 * np.median(regrets):.1f}, mean {100 * np.mean(regrets):.1f};"
        f" at random {100 * np.median(random):.1f} and {100 * np.mean(random):.1f}",
        f"  Kendall's tau: mean {np.mean(taus):.2f} over {len(taus)} families; at random 0",
    ]


def write(c: constants.Constants) -> None:
    """Replace the values in configs/planner.yaml, and leave everything else as it is."""
    text = constants.PATH.read_text()
    for name, value in dataclasses.asdict(c).items():
        pattern = rf"(^{name}:\n  \{{expected: [^,]+, spread: [^,]+, value: )[^,]+"
        text = re.sub(pattern, rf"\g<1>{value:.4g}", text, flags=re.MULTILINE)
    constants.PATH.write_text(text)


def write_intervals(scored: Sequence[Scored]) -> None:
    """The intervals of held-out errors, of all rows of the promised kind and by regime; the head of the file stays."""
    known = [one for one in scored if one.quantities]
    groups = {intervals.ALL: [one for one in known if one.row.in_bar]}
    for regime in (intervals.SINGLE, intervals.DATA, SPREAD):
        groups[regime] = [one for one in groups[intervals.ALL] if one.row.regimes[0] == regime]
    groups["fp8"] = [one for one in known if one.row.regimes[0] == "fp8"]
    text = "".join(line for line in intervals.PATH.read_text().splitlines(keepends=True) if line.startswith("#"))
    for name, group in groups.items():
        sources = {one.row.source for one in group}
        if len(sources) >= FEWEST_SOURCES or name == "fp8":
            low, high = interval([(one.row.source, -one.error) for one in group])
            text += f"{name}: {{low: {low:.4f}, high: {high:.4f}, rows: {len(group)}, sources: {len(sources)}}}\n"
    intervals.PATH.write_text(text)


if __name__ == "__main__":
    main()
