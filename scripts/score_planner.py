"""Score the planner against runs that others published: python scripts/score_planner.py docs/data/published_runs.csv

Prints, by source, GPU and regime, the error |log(predicted / measured)| of tokens/s with the constants fitted to all
other sources, beside a null model and, if it is installed, mlsysim; then how well the planner chooses among layouts;
then the error of the peak of memory, which has no fitted constants. It takes any file with these columns. The runs of
docs/data/published_runs.csv are known too: constants are fitted to those of them whose source the file does not have.
--fit also writes the constants that fit all sources to configs/planner.yaml, and the intervals of their errors to
configs/planner_intervals.yaml.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.scoring import memory, peer
from scripts.scoring.fitting import Point, errors, fitted
from scripts.scoring.jobs import job_of
from scripts.scoring.rows import SPEED, Row, read
from scripts.scoring.scores import Scored, choices, interval, mean_of, mean_of_sources, null_speed, summary
from train.command.planning import constants, intervals
from train.command.planning.intervals import SPREAD
from train.command.planning.quantities import quantities
from train.command.process.exits import reported_once
from train.config.world import World

KNOWN = Path(__file__).resolve().parent.parent / "docs" / "data" / "published_runs.csv"
ENOUGH_SOURCES = 5
FEWEST_SOURCES = 3  # of a regime whose interval is written
SHOWN = 5  # names of rows in a line
HEAD = "rows    mean  median     p90    bias    null mlsysim"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="a CSV file with the columns of docs/data/published_runs.csv")
    parser.add_argument("--fit", action="store_true", help="write the constants that fit all sources")
    args = parser.parse_args()
    with reported_once(World.single(), trains=False):
        rows = read(args.runs)
        every = with_intervals(held_out([row for row in [*rows, *other_runs(rows)] if row.tokens_per_s]))
        own = {id(row) for row in rows}
        scored = [beside_peer(one) for one in every if id(one.row) in own]
        print("\n".join([*by_group(scored), "", *bars(scored), "", *choosing(scored), "", *memory.lines(rows)]))
        print("\n".join(remarks(rows)))
        if args.fit:
            write(fitted([*map(point, (one for one in every if one.row.in_bar and one.quantities))]))
            write_intervals(every)


def other_runs(rows: Sequence[Row]) -> list[Row]:
    """The known runs of sources of which the file has none."""
    sources = {row.source for row in rows}
    return [row for row in read(KNOWN) if row.source not in sources] if KNOWN.exists() else []


def point(one: Scored) -> Point:
    assert one.quantities is not None
    return Point(one.quantities, one.measured, one.row.source)


def beside_peer(one: Scored) -> Scored:
    return dataclasses.replace(one, peer=peer.speed(one.quantities.job)) if one.quantities else one


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
        others = [x for x in scored if x.row.in_bar and x.quantities and x.row.source != one.row.source]
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
    width = max(map(len, groups), default=0)
    lines = [f"{'error of tokens/s in %, held out by source':<{width}}   {HEAD}   no cell blank: rows, mean"]
    for name, group in sorted(groups.items()):
        stated = [abs(one.error) for one in group if not one.row.defaulted]
        also = f"{len(stated):>18} {100 * np.mean(stated):>6.1f}" if stated else f"{0:>18}"
        lines.append(f"{name:<{width}}  {figures(group)} {also}")
    return lines


def figures(group: Sequence[Scored]) -> str:
    """The columns of HEAD."""
    return f"{summary(one.error for one in group)} {mean_of(group, 'null'):>7} {mean_of(group, 'peer'):>7}"


def bars(scored: Sequence[Scored]) -> list[str]:
    promised = [one for one in scored if one.row.in_bar]
    if not promised:
        return ["no row is of the kind that is promised: a dense model on A100 or H100, 16 bits or not stated"]
    spread = [one for one in promised if one.row.regimes[0] == SPREAD]
    groups = {
        "A100 and H100, 16 bits or not stated": promised,
        "  no cell blank": [one for one in promised if not one.row.defaulted],
        "  over several nodes with TP or PP": spread,
        "  the same, no cell blank": [one for one in spread if not one.row.defaulted],
    }
    lines = [f"{'promised':<38}   {HEAD}  mean of sources"]
    for name, group in groups.items():
        if group:
            lines.append(f"{name:<38}  {figures(group)} {100 * mean_of_sources(group):>16.1f}")
    inside = 100 * np.mean([one.inside for one in promised])
    return [*lines, f"the truth is inside the 80 % interval in {inside:.0f} % of {len(promised)} rows"]


def choosing(scored: Sequence[Scored]) -> list[str]:
    stated = [one for one in scored if not one.row.defaulted]
    return [*_choosing("choice of a layout", scored), *_choosing("the same without rows with a blank cell", stated)]


def _choosing(name: str, scored: Sequence[Scored]) -> list[str]:
    found = choices(scored)
    if not found:
        return [f"{name}: no family of three layouts or more"]
    regrets, random = [one.regret for one in found], [one.random_regret for one in found]
    taus = [one.tau for one in found if one.tau is not None]
    tau = f"mean {np.mean(taus):.2f} over {len(taus)} families" if taus else "no speeds that differ by more than noise"
    return [
        f"{name}, in {len(found)} families of {sum(one.layouts for one in found)} layouts",
        f"  regret in %: median {100 * np.median(regrets):.1f}, mean {100 * np.mean(regrets):.1f};"
        f" at random {100 * np.median(random):.1f} and {100 * np.mean(random):.1f}",
        f"  Kendall's tau: {tau}; at random 0",
    ]


def remarks(rows: Sequence[Row]) -> list[str]:
    """What was left out, and which rows are not predicted."""
    silent = [row for row in rows if not row.tokens_per_s and row.cells[SPEED]]
    unknown = [row.cells["row_id"] for row in rows if job_of(row) is None]
    found = [f"{len(silent)} rows have a speed that is not a positive number, and are not scored"] if silent else []
    if unknown:
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        found.append(
            f"{len(unknown)} rows are not predicted and count with an error of 100 %, as their GPU or precision is "
            f"unknown, their model is a mixture, or their counts are no layout: {', '.join(unknown[:SHOWN])}{more}"
        )
    return found if peer.installed() else [*found, f"mlsysim is not installed, so its column is empty: {peer.INSTALL}"]


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
