"""Decides which runs may be compared: runs of the same work, and among these the runs with the same loss.

Two runs of the same work (model, data, optimiser, precision, seed, batch, steps) must have the same loss, except for
the order of summation. A sweep whose points have different batches (fairness `micro` or `best`) is compared only by
speed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from scripts.comparing.excuses import excuse_of
from scripts.comparing.results import Figures, figures_of
from scripts.comparing.runs import Run, label
from scripts.comparing.work import work_in_words
from train.config.rules.idle import unread
from train.config.rules.read_when import READ_WHEN
from train.measure.results import LOSS, has_no_target
from train.record.run_files import clean, number
from train.record.run_folder import deciding, flat

# The largest relative difference of train/loss that is allowed in the first steps. It is far above the measured effect
# of rounding (docs/reading-the-numbers.md). Rounding errors grow with the steps, so later steps are shown, not judged.
BOUNDS = {"float64": 1e-6, "float32": 1e-3, "bf16": 5e-2, "fp8": 5e-2}
MOST_DIFFERENCES = 8  # between two works, in a heading
FIRST_STEPS = 20
MOST_VOTERS = 100  # the most runs with which a possible reference is compared
MEASURES = {  # measures of memory with their names, the best first; a group uses the first that all its runs have
    "allocated_mib": "allocated at the peak",
    "tensors_mib": "tensors at the peak, sampled",
    "state_mib": "parameters + gradients + optimiser state",
}
ENVIRONMENT = ("device", "world_size", "commit", "torch", "backend", "platform", "omp_threads")

MEASURING = (  # keys that do not affect the training, but how a figure of the table is measured or priced
    "metrics.warmup_steps",
    "metrics.profile_every",
    "metrics.tensorboard",
    "metrics.trackers",
    "metrics.trace",
    "metrics.memory_snapshot",
    "hardware.peak_tflops",
    "hardware.price_usd_per_hour",
    "hardware.grid_gco2_per_kwh",
)


@dataclass
class Row:
    """A run, its figures, and whether it computed the same as the reference of the group."""

    run: Run
    figures: Figures
    equal: str = "-"
    good: bool = True  # False: its loss differs, so it cannot be the best
    excused: bool = False  # its loss differs, as its strategy declares in advance


@dataclass
class Group:
    """Rows that may be in the same table."""

    heading: str
    rows: list[Row]
    memory: str = ""  # the measure in memory_mib
    notes: list[str] = field(default_factory=list)


def groups_of(runs: list[Run]) -> list[Group]:
    """One group for each work. That of most runs is first; the headings of the others say how they differ from it."""
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
    return not _speed_only(run) and run.work_hash is not None


def _speed_only(run: Run) -> bool:
    return run.fairness in ("micro", "best")


def _key(run: Run) -> str:
    return f"speed only, {run.sweep.folder}" if _speed_only(run) and run.sweep else run.work_hash or ""


def _heading(run: Run, first: Run) -> str:
    if _speed_only(run) and run.sweep is not None:
        return f"Different batch: speed only ({clean(run.sweep.folder.name)}, batch={run.fairness})"
    if run.work_hash is None:
        return "Work unknown (no work.json): these runs may not be comparable, so their losses are not compared"
    if run.work_hash == first.work_hash or first.work_hash is None:
        return f"Same work: {work_in_words(run)}"
    mine, theirs = flat(deciding(run.compared)), flat(deciding(first.compared))
    differ = [f"{key} {_short(mine.get(key))}, not {_short(theirs.get(key))}"
              for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]  # fmt: skip
    why = "; ".join(differ[:MOST_DIFFERENCES]) or "work.json does not say what differs"
    more = f"; and {len(differ) - MOST_DIFFERENCES} more" if len(differ) > MOST_DIFFERENCES else ""
    return f"Other work, not comparable with the first table: {why}{more}"


def _short(value: Any) -> str:
    text = "none" if value is None else clean(value)
    return text if len(text) <= 16 else text[:8] + "…"  # shortens a sha256 as git does


def judge(rows: Sequence[Row]) -> None:
    """Set `equal` of each row: the result of comparing its losses with the reference."""
    usable = [row for row in rows if row.run.steps] if len(rows) > 1 else []
    reference = _reference(usable) if usable else None
    for row in rows:
        if row is reference:
            row.equal = "reference"
        elif reference is not None and row.run.steps:
            row.equal, row.good = _verdict(row, reference)


def _reference(rows: list[Row]) -> Row:
    """The row with which the others are compared: `single` if there is one, else the first of the rows that agree with
    most others. A row that must be exact is preferred, so that neither a lossy nor a wrong run is the reference."""

    def agreeing(row: Row) -> int:
        apart = [difference(other.run, row.run, FIRST_STEPS) for other in rows[:MOST_VOTERS]]
        return sum(found is not None and found <= bound_of(row.run) for found in apart)

    exact = {id(row): excuse_of(row.run).exact for row in rows}
    return min(rows, key=lambda row: (not exact[id(row)], row.run.strategy != "single", -agreeing(row)))


def _verdict(row: Row, reference: Row) -> tuple[str, bool]:
    found = difference(row.run, reference.run, FIRST_STEPS)
    if found is None:
        return "no step in common", True
    row.figures["loss_difference"] = number(found)
    excuse = excuse_of(row.run)
    if found <= max(bound_of(row.run), excuse.bound):
        return (f"yes ({found:.1e})" if found else "yes (0)"), True
    row.excused = bool(excuse.reasons) and math.isfinite(found)
    if row.excused:
        return f"loss differs ({found:.1e}), which is allowed: {', '.join(excuse.reasons)}", True
    return f"loss differs ({found:.1e})", False


def bound_of(run: Run) -> float:
    """The bound for the run's precision. An unknown precision has the bound of float32."""
    return BOUNDS.get(run.precision, BOUNDS["float32"])


def difference(run: Run, reference: Run, up_to: int | None = None) -> float | None:
    """The largest |a - b| / |b| of train/loss over common steps; infinite if a loss is not a finite number; None if
    there is no common step. Steps in which neither run had a valid token are not compared."""
    theirs_by_step = {step["step"]: step for step in reference.steps}
    worst: float | None = None
    for record in run.steps:
        other = theirs_by_step.get(record["step"])
        if (
            other is None
            or (up_to is not None and record["step"] > up_to)
            or (has_no_target(record) and has_no_target(other))
        ):
            continue
        mine, theirs = record[LOSS], other[LOSS]
        if mine is None or theirs is None:
            return float("inf")
        worst = max(worst or 0.0, abs(mine - theirs) / max(abs(theirs), 1e-300))
    return worst


def _choose_memory(group: Group) -> None:
    """Choose one measure of memory for all rows: the peak of one run cannot be compared with the state of another."""
    for column, name in MEASURES.items():
        if all(row.figures[column] is not None for row in group.rows if row.run.steps):
            group.memory = name
            for row in group.rows:
                row.figures["memory_mib"] = row.figures[column]
            return


def _note(group: Group) -> None:
    runs = [row.run for row in group.rows]
    group.notes += [f"{run.label}: {run.status}" for run in runs if run.status != "finished"]
    group.notes += [f"{run.label}: {line}" for run in runs for line in run.notes]
    for run in runs:
        if run.steps and not run.results.num_measured:
            note = "there is no unrecorded step after warm-up, so its figures contain all steps"
            group.notes.append(f"{run.label}: {note}")
    group.notes += [f"not the same {name}: {', '.join(seen)}" for name, seen in unequal(runs).items()]
    if len(ends := {run.validations[-1]["step"] for run in runs if run.validations}) > 1:
        group.notes.append(f"validation losses are of different steps: {', '.join(map(str, sorted(ends)))}")
    if all(not run.results.num_recorded for run in runs):
        group.notes.append("no sampled step (metrics.profile_every): exposed communication and bubble are not known")


def unequal(runs: list[Run]) -> dict[str, list[str]]:
    """Settings that are not part of the work but affect figures of the table, if runs differ in them, with their
    values."""
    found: dict[str, list[str]] = {}
    for name in (*ENVIRONMENT, *MEASURING):
        values = [_setting(run, name) if name in MEASURING else run.facts.get(name) for run in runs]
        if len(seen := dict.fromkeys(clean(value, 60) for value in values if value is not None)) > 1:
            found[name] = list(seen)
    return found


def _setting(run: Run, name: str) -> Any:
    """The value of the key, or the values of the keys below it; None if the run did not read it."""
    if name in unread(run.config, READ_WHEN):
        return None
    below = {key.removeprefix(f"{name}."): value for key, value in run.config.items() if key.startswith(f"{name}.")}
    return run.config.get(name, below or None)
