"""One run's figures, from the lines of its metrics: medians after warm-up, intervals, shares. None where unknown.

What they mean and what they leave out: docs/reading-the-numbers.md.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable

from scripts.comparing.runs import Run
from train.measure.quantiles import median_interval, quantile
from train.record.run_files import Record, number

STATE_KINDS = ("parameters", "gradients", "optimiser")
TIME_PARTS = ("forward", "backward", "optimiser", "communication", "data", "other")
MEMORY_KINDS = (*STATE_KINDS, "activations", "communication", "temporary", "untracked")
MIB_PER_GIB = 1024.0
STATE_TAG = re.compile(rf"memory_by_rank/({'|'.join(STATE_KINDS)})_mib/rank_(\d{{1,6}})")
SENT_TAG = re.compile(r"comm/([a-z][a-z_.]*)/[a-z_]+_mib")
Figures = dict[str, float | None]


def figures_of(run: Run) -> Figures:
    """Every numeric column of the table, but those that need other runs."""
    speeds, times = values(run.unprofiled, "perf/tokens_per_s"), values(run.unprofiled, "perf/step_ms")
    low, high = median_interval(speeds)
    shares = time_parts(run)
    return {
        "world": None if run.world_size is None else float(run.world_size),
        "steps": float(run.steps[-1]["step"]) if run.steps else 0.0,
        "tokens_per_s": median(speeds),
        "tokens_per_s_ci95_low": low,
        "tokens_per_s_ci95_high": high,
        "tokens_per_s_per_device": median(values(run.unprofiled, "perf/tokens_per_s_per_device")),
        "step_ms_p50": quantile(times, 0.5),
        "step_ms_p95": quantile(times, 0.95),
        "mfu_pct": median(values(run.unprofiled, "perf/mfu_pct")),
        **_memory(run),
        "sent_mib_per_step": total(sent_by_axis(run).values()),
        "exposed_comm_pct": 100 * shares["communication"] / sum(shares.values()) if shares else None,
        "bubble_pct": median(values(run.sampled, "pipeline/bubble_pct")),
        "bubble_theory_pct": median(values(run.sampled, "pipeline/bubble_theory_pct")),
        "joules_per_step": last(values(run.steps, "energy/joules_per_step")),  # a mean since warm-up
        "usd_per_million_tokens": median(values(run.unprofiled, "cost/usd_per_million_tokens")),
        "gco2_per_million_tokens": last(values(run.steps, "cost/gco2_per_million_tokens")),
        "train_loss": last(values(run.steps, "train/loss")),
        "validation_loss": last(values([*run.validations, run.summary], "validation/loss")),
    }


def _memory(run: Run) -> Figures:
    """MiB of the largest rank: three measures, of which `memory_mib` takes the best that all runs compared have."""
    state = [largest(run.measured, f"memory/{kind}_mib") for kind in STATE_KINDS]
    at_peak = [total(memory_kinds(record).values()) for record in run.sampled]
    allocated = largest(run.measured, "memory/peak_allocated_gib")
    resident = largest(run.measured, "memory/resident_gib")
    return {
        "memory_mib": None,
        "allocated_mib": None if allocated is None else allocated * MIB_PER_GIB,
        "tensors_mib": max((value for value in at_peak if value is not None), default=None),
        "state_mib": None if None in state else total(state),
        "resident_mib": None if resident is None else resident * MIB_PER_GIB,
    }


def values(records: Iterable[Record], tag: str) -> list[float]:
    """The tag's finite values, in order."""
    return [value for record in records if (value := number(record.get(tag))) is not None]


def total(parts: Iterable[float | None]) -> float | None:
    """Their sum; None of none."""
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def median(of: list[float]) -> float | None:
    return statistics.median(of) if of else None


def last(of: list[float]) -> float | None:
    return of[-1] if of else None


def largest(records: Iterable[Record], tag: str) -> float | None:
    return max(values(records, tag), default=None)


def time_parts(run: Run) -> dict[str, float]:
    """ms of each part, mean over the sampled steps; empty if none was sampled. They add up to the sampled step."""
    found = {part: values(run.sampled, f"time/{part}_ms") for part in TIME_PARTS}
    return {part: statistics.fmean(ms) for part, ms in found.items() if ms} if found["forward"] else {}


def memory_kinds(record: Record) -> dict[str, float]:
    """MiB by kind at the peak of the rank with the largest, in a sampled step's line."""
    found = {kind: number(record.get(f"memory_at_peak/{kind}_mib")) for kind in MEMORY_KINDS}
    return {kind: mib for kind, mib in found.items() if mib is not None}


def memory_by_rank(run: Run) -> dict[int, dict[str, float]]:
    """MiB by rank and kind: at the peak of the last sampled step, else of state alone; empty if neither is known."""
    ranks: dict[int, dict[str, float]] = {}
    for rank in run.sample.get("ranks", []):
        kinds = rank["memory"]["at_peak_mib"]
        if known := {kind: mib for kind in MEMORY_KINDS if (mib := number(kinds.get(kind))) is not None}:
            ranks[rank["rank"]] = known
    return ranks or state_by_rank(run)


def state_by_rank(run: Run) -> dict[int, dict[str, float]]:
    """MiB of parameters, gradients and optimiser state by rank, as of the last step."""
    ranks: dict[int, dict[str, float]] = {}
    for tag, value in (run.steps[-1] if run.steps else {}).items():
        match = STATE_TAG.fullmatch(tag)
        if match and (mib := number(value)) is not None:
            ranks.setdefault(int(match[2]), {})[match[1]] = mib
    return dict(sorted(ranks.items()))


def sent_by_axis(run: Run) -> dict[str, float]:
    """MiB that rank 0 sends in a step, by mesh axis, as last counted; the lab's own traffic left out."""
    axes: dict[str, float] = {}
    for record in reversed(run.steps):
        for tag, value in record.items():
            match = SENT_TAG.fullmatch(tag)
            if match and match[1] != "lab" and (mib := number(value)) is not None:
                axes[match[1]] = axes.get(match[1], 0.0) + mib
        if axes:
            break
    return axes
