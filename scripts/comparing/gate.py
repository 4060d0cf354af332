"""Which runs may be compared: those of one work, and of them those whose loss is the same.

Two runs of one work_hash (model, data, optimiser, precision, seed, batch, steps) must have the same loss, up to the
order of summation. A sweep that let the batch differ (fairness `micro` or `best`) is compared by speed alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .figures import Figures, figures_of
from .runs import Record, Run, flat, label, number

# largest relative difference of train/loss in the first steps: far above what rounding was seen to do (docs), and
# rounding grows with the steps, so later ones are shown and not judged
BOUNDS = {"float64": 1e-6, "float32": 1e-3, "bf16": 5e-2}
LOOSEST = 5e-2
FIRST_STEPS = 20
MEASURES = {  # the best that every run of a group has: what it is called
    "allocated_mib": "allocated at the peak",
    "tensors_mib": "tensors at the peak, sampled",
    "state_mib": "parameters + gradients + optimiser state",
}
ENVIRONMENT = ("device", "world_size", "commit", "torch", "backend", "platform", "omp_threads")


@dataclass
class Row:
    """A run, its figures, and whether it computed what the group's reference did."""

    run: Run
    figures: Figures
    equal: str = "-"
    good: bool = True  # False: its loss differs, so it wins nothing
    excused: bool = False  # its loss differs, as it says beforehand


@dataclass
class Group:
    """Rows that may stand in one table."""

    heading: str
    rows: list[Row]
    memory: str = ""  # what memory_mib is
    notes: list[str] = field(default_factory=list)


def groups_of(runs: list[Run]) -> list[Group]:
    """The work that most runs share first; the others each under a heading that says what differs from it."""
    by_work: dict[str, list[Run]] = {}
    for run in runs:
        by_work.setdefault(_key(run), []).append(run)
    ordered = sorted(by_work.values(), key=lambda same: (not _gated(same[0]), -len(same)))
    groups: list[Group] = []
    for same in ordered:
        label(same)
        rows = [Row(run, figures_of(run)) for run in same]
        groups.append(Group(_heading(same[0], ordered[0][0]), rows))
        if _gated(same[0]):
            judge(rows)
        _choose_memory(groups[-1])
        _note(groups[-1])
    return groups


def _gated(run: Run) -> bool:
    return not _speed_only(run) and "work_hash" in run.facts


def _speed_only(run: Run) -> bool:
    return run.fairness in ("micro", "best")


def _key(run: Run) -> str:
    return f"speed only, {run.sweep}" if _speed_only(run) else str(run.facts.get("work_hash", ""))


def _heading(run: Run, first: Run) -> str:
    if _speed_only(run) and run.sweep is not None:
        return f"different batch: speed only ({run.sweep.name}, batch={run.fairness})"
    if "work_hash" not in run.facts:
        return "work unknown (no work.json): not known to be comparable, losses not compared"
    work_hash = run.facts["work_hash"]
    if work_hash == first.facts.get("work_hash") or "work_hash" not in first.facts:
        return f"same work ({work_hash})"
    mine, theirs = flat(run.work.get("work", {})), flat(first.work.get("work", {}))
    differ = [f"{key} {_short(mine.get(key))}, not {_short(theirs.get(key))}"
              for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]  # fmt: skip
    why = "; ".join(differ) or "work.json does not say in what"
    return f"other work {work_hash}, not comparable with the first table: {why}"


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 16 else text[:8] + "…"  # of a sha256, as git does


def judge(rows: Sequence[Row]) -> None:
    """Set `equal`: each loss curve against the reference: `single` if there, else the first with a step, and one that
    is not expected to differ before one that is."""
    usable = [row for row in rows if row.run.steps] if len(rows) > 1 else []
    reference = min(usable, key=lambda row: (not _exact(row.run), row.run.strategy != "single"), default=None)
    for row in rows:
        if row is reference:
            row.equal = "reference"
        elif reference is not None:
            row.equal, row.good = _verdict(row, reference)


def _verdict(row: Row, reference: Row) -> tuple[str, bool]:
    found = difference(row.run, reference.run, FIRST_STEPS)
    if found is None:
        return "no step in common", False
    row.figures["loss_difference"] = number(found)
    lossy = row.run.facts.get("lossy") or {}
    bound = max(BOUNDS.get(row.run.precision, LOOSEST), lossy.get("bound") or 0.0)
    if found <= bound:
        return (f"yes ({found:.1e})" if found else "yes (0)"), True
    may = [*row.run.facts.get("differs", {}), *([lossy["says"]] if lossy and lossy["bound"] is None else [])]
    row.excused = bool(may) and math.isfinite(found)
    if row.excused:
        return f"loss differs ({found:.1e}), as it may: {', '.join(may)}", True
    return f"loss differs ({found:.1e})", False


def _exact(run: Run) -> bool:
    """Whether the run says of itself that it computes what one device does."""
    return not run.facts.get("differs") and not run.facts.get("lossy")


def difference(run: Run, reference: Run, up_to: int | None = None) -> float | None:
    """The largest |a - b| / |b| of train/loss over common steps; infinite if one is not a number; None of none.
    Steps in which neither run had a valid token have no loss to compare."""
    theirs_by_step = {step["step"]: step for step in reference.steps}
    worst: float | None = None
    for record in run.steps:
        other = theirs_by_step.get(record["step"])
        if other is None or (up_to is not None and record["step"] > up_to) or (_empty(record) and _empty(other)):
            continue
        mine, theirs = number(record["train/loss"]), number(other["train/loss"])
        if mine is None or theirs is None:
            return float("inf")
        worst = max(worst or 0.0, abs(mine - theirs) / max(abs(theirs), 1e-300))
    return worst


def _empty(record: Record) -> bool:
    return record.get("train/valid_tokens") == 0


def _choose_memory(group: Group) -> None:
    """One measure for all rows: a peak of one beside the bare state of another would compare nothing."""
    for column, name in MEASURES.items():
        if all(row.figures[column] is not None for row in group.rows if row.run.steps):
            group.memory = name
            for row in group.rows:
                row.figures["memory_mib"] = row.figures[column]
            return


def _note(group: Group) -> None:
    runs = [row.run for row in group.rows]
    group.notes += [f"{run.label}: {run.status}" for run in runs if run.status != "finished"]
    for run in runs:
        if run.steps and len(run.measured) == len(run.steps):
            group.notes.append(f"{run.label}: no step after warm-up yet, the first ones are in its figures")
    for name in ENVIRONMENT:
        seen = dict.fromkeys(str(run.facts[name]) for run in runs if name in run.facts)
        if len(seen) > 1:
            group.notes.append(f"not the same {name}: {', '.join(seen)}")
    if all(not run.sampled for run in runs):
        group.notes.append("no sampled step (metrics.profile_every): exposed communication and bubble are not known")
