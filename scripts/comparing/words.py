"""Sentences about a table or a picture: which run is fastest, which needs least memory, where the time goes."""

from __future__ import annotations

from scripts.comparing.gate import Group, Row, difference
from scripts.comparing.results import time_parts
from scripts.comparing.table import best, formatted
from train.measure.results import TIME_PARTS

TIE = 0.01  # two rows whose memory differs by at most this fraction are equal
PART_NAMES = {part: part for part in TIME_PARTS} | {
    "communication": "exposed communication",
    "data": "loading",
}


def summary(group: Group) -> list[str]:
    """The sentences at the top of a report."""
    sentences = [speed(group), memory(group)]
    ranked = by_speed(group)
    if len(ranked) > 1:
        sentences += [shares(row) for row in (ranked[0], ranked[-1])]
        if not any(time_parts(row.run) for row in ranked):
            sentences.append("No run has a sampled step (metrics.profile_every), so the parts of its time are unknown.")
    return [sentence for sentence in sentences if sentence]


def verdicts(groups: list[Group]) -> list[str]:
    """The summary of each group, and a sentence about its losses. If there are several groups, its heading is first."""
    judged = [any(row.equal == "reference" for row in group.rows) for group in groups]
    lines = [
        " ".join([*summary(group), *([losses(group)] if known else [])])
        for group, known in zip(groups, judged, strict=True)
    ]
    return lines if len(lines) == 1 else [f"{g.heading}: {line}" for g, line in zip(groups, lines, strict=True)]


def by_speed(group: Group) -> list[Row]:
    """The rows whose losses are right, the fastest first."""
    known = [row for row in group.rows if row.good and row.figures["tokens_per_s"] is not None]
    return sorted(known, key=lambda row: -(row.figures["tokens_per_s"] or 0.0))


def speed(group: Group) -> str:
    """Which run is fastest, by which factor, and whether the intervals support this."""
    ranked = by_speed(group)
    if not ranked:
        return "No run has measured its speed yet."
    first = ranked[0]
    top = f"{formatted(first.figures['tokens_per_s'])} tokens/s"
    if len(ranked) == 1:
        return f"{first.run.label}: {top}."
    last = ranked[-1]
    ratio = (first.figures["tokens_per_s"] or 0.0) / (last.figures["tokens_per_s"] or 1.0)
    slowest = f"{ratio:.3g} times {last.run.label}, the slowest"
    low = first.figures["tokens_per_s_ci95_low"]
    if low is None:
        return f"{first.run.label} has the highest median, {top}, {slowest}; too few steps for an interval."
    near = [row.run.label for row in ranked[1:] if (row.figures["tokens_per_s_ci95_high"] or float("inf")) >= low]
    if near:
        return (
            f"{first.run.label} has the highest median, {top}, {slowest}; its interval overlaps that of {listed(near)}."
        )
    return f"{first.run.label} is fastest: {top}, {slowest}."


def memory(group: Group) -> str:
    """Which runs have the least memory on their largest rank, including ties."""
    winner = best(group, "memory_mib")
    if winner is None:
        return ""
    least = winner.figures["memory_mib"] or 0.0
    ties = [
        r.run.label for r in group.rows if r.good and (r.figures["memory_mib"] or float("inf")) <= least * (1 + TIE)
    ]
    if len(ties) == len(group.rows):
        return f"All need the same memory: {formatted(least)} MiB on the largest rank ({group.memory})."
    needs = "need" if len(ties) > 1 else "needs"
    return f"{listed(ties)} {needs} the least memory: {formatted(least)} MiB on the largest rank ({group.memory})."


def shares(row: Row) -> str:
    """A sentence about the largest part of a sampled step; empty if no step was sampled."""
    parts = time_parts(row.run)
    if not parts:
        return ""
    part = max(parts, key=lambda name: parts[name])
    share = 100 * parts[part] / sum(parts.values())
    return f"{row.run.label}: the largest part of its sampled step is {PART_NAMES[part]}, {share:.0f} %."


def losses(group: Group) -> str:
    """How far the loss curves are from the reference, with the run that is farthest."""
    reference = next((row for row in group.rows if row.equal == "reference"), None)
    if reference is None:
        return "There is no reference with which the loss curves can be compared."
    apart = {row.run.label: found for row in group.rows if row is not reference
             if (found := difference(row.run, reference.run)) is not None}  # fmt: skip
    if not apart:
        return f"There is no other run of the same work with which the loss of {reference.run.label} can be compared."
    worst = max(apart, key=lambda label: apart[label])
    wrong = [row.run.label for row in group.rows if not row.good]
    excused = [row.run.label for row in group.rows if row.excused]
    verdict = f"{listed(wrong)} computed something else" if wrong else "The loss curves are the same"
    if excused and not wrong:
        verdict = f"The loss curve of {listed(excused)} differs, which is allowed"
    return f"{verdict}: at most {apart[worst]:.1e} of the loss from {reference.run.label} over all steps ({worst})."


def listed(names: list[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
