"""The figures of one run for the columns of the table, from the results of its records. An unknown figure is None.

docs/reading-the-numbers.md explains the figures. train/measure/results.py defines which records count.
"""

from __future__ import annotations

from scripts.comparing.runs import Run
from train.measure.quantiles import quantile
from train.measure.results import (
    AT_PEAK,
    LOSS,
    MEMORY,
    MEMORY_KINDS,
    STATE_KINDS,
    TIME_PARTS,
    VALIDATION_LOSS,
    by_axis,
    exposed_pct,
    state_by_rank,
    state_mib,
)
from train.record.run_files import number

MIB_PER_GIB = 1024.0
Figures = dict[str, float | None]


def figures_of(run: Run) -> Figures:
    """Every numeric column of the table, except those that depend on other runs."""
    of, spread, sent = run.results, run.results.spread(), sent_by_axis(run)
    validations = [number(record.get(VALIDATION_LOSS)) for record in (*run.validations, run.summary)]
    return {
        "world": None if run.world_size is None else float(run.world_size),
        "steps": float(run.steps[-1]["step"]) if run.steps else 0.0,
        "tokens_per_s": of.median("perf/tokens_per_s"),
        "tokens_per_s_ci95_low": spread.get("perf/tokens_per_s_ci95_low"),
        "tokens_per_s_ci95_high": spread.get("perf/tokens_per_s_ci95_high"),
        "tokens_per_s_per_device": of.median("perf/tokens_per_s_per_device"),
        "step_ms_p50": spread.get("perf/step_ms_p50"),
        "step_ms_p95": spread.get("perf/step_ms_p95"),
        "mfu_pct": of.median("perf/mfu_pct"),
        **_memory(run),
        "sent_mib_per_step": sum(sent.values()) if sent else None,
        "exposed_comm_pct": exposed_pct(time_parts(run)),
        "bubble_pct": quantile(of.recorded("pipeline/bubble_pct"), 0.5),
        "bubble_theory_pct": quantile(of.recorded("pipeline/bubble_theory_pct"), 0.5),
        "joules_per_step": of.latest.get("energy/joules_per_step"),  # a mean since warm-up
        "usd_per_million_tokens": of.median("cost/usd_per_million_tokens"),
        "gco2_per_million_tokens": of.latest.get("cost/gco2_per_million_tokens"),
        "train_loss": of.latest.get(LOSS),
        "validation_loss": next((loss for loss in reversed(validations) if loss is not None), None),
    }


def _memory(run: Run) -> Figures:
    """MiB of the largest rank by several measures. Later `memory_mib` gets the best measure that all runs have."""
    largest, state_of_one = run.results.settled, state_mib(run.results.latest)
    state = [largest.get(f"{MEMORY}{kind}_mib") for kind in STATE_KINDS]
    known = [mib for mib in state if mib is not None]
    allocated, resident = largest.get("memory/peak_allocated_gib"), largest.get("memory/resident_gib")
    return {
        "memory_mib": None,
        "allocated_mib": None if allocated is None else allocated * MIB_PER_GIB,
        "tensors_mib": quantile(run.results.recorded(AT_PEAK), 1.0),
        # if values of single ranks are missing: the sum of the largest of each kind, which may be on different ranks
        "state_mib": state_of_one if state_of_one is not None else sum(known) if len(known) == len(state) else None,
        "resident_mib": None if resident is None else resident * MIB_PER_GIB,
    }


def time_parts(run: Run) -> dict[str, float]:
    """The ms of each part, as means over the recorded steps; their sum is the time of a recorded step. Empty if no step
    was recorded."""
    found = {part: run.results.recorded(f"time/{part}_ms").mean() for part in TIME_PARTS}
    return {part: ms for part, ms in found.items() if ms is not None} if found["forward"] is not None else {}


def memory_by_rank(run: Run) -> dict[int, dict[str, float]]:
    """MiB by rank and kind at the peak of the last sampled step or, without one, between steps. Empty if unknown."""
    ranks: dict[int, dict[str, float]] = {}
    for rank in run.sample.get("ranks", []):
        kinds = rank["memory"]["at_peak_mib"]
        if known := {kind: mib for kind in MEMORY_KINDS if (mib := number(kinds.get(kind))) is not None}:
            ranks[rank["rank"]] = known
    return ranks or state_of_ranks(run)


def state_of_ranks(run: Run) -> dict[int, dict[str, float]]:
    """MiB of parameters, gradients and optimiser state by rank, from the last step that has them."""
    return state_by_rank(run.results.latest)


def sent_by_axis(run: Run) -> dict[str, float]:
    """MiB that rank 0 sends in a step, by mesh axis, from the last count. Traffic of the measurements is left out."""
    return by_axis(run.results.latest)
