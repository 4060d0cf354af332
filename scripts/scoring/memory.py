"""Scores the planner's memory against the peaks that others published, and whether it says that their runs fit.

A source prints what the allocator gave (allocated), what it took from the device (reserved), or what the whole device
held. Only the words in `notes` say which. They label the measured column; of the same row, all three can be predicted.

The lab's closed form is changed where engines of others differ in a way that a column states or that all of them share:
    pipeline       they receive into a few buffers, not into one for each microbatch
    unsharded      they gather the embedding in 16 bits too
    "offload"      in zero_or_fsdp: the optimiser and its float32 weights are on the host, the rest in 16 bits
    activations    activations and losses have fused kernels, as under compile.enabled; with sequence parallelism, the
                   inputs of split layers are gathered again in the backward (Megatron)
    schedules      of zb-2p 2p - 1 microbatches are on their way instead of p, of zbv as many as of 1f1b, of v-half and
                   v-min a half and a third of that (Qi et al. 2023); of v virtual stages of other schedules
                   1 + (p-1)/(pv) times as many as of one (Korthikanti et al. 2022)
    DeepSpeed      where the precision is stated as bf16, it has gradients in 16 bits beside those in 32 bits in which
                   they add up; in fp16 it has none of these
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scripts.scoring.jobs import is_deepspeed, job_of, schedule
from scripts.scoring.rows import Row
from scripts.scoring.scores import NOT_PREDICTED, summary
from train.command.planning.footprint import Footprint, candidates, constant, of_rank, outside, reserve
from train.command.planning.job import Job
from train.command.planning.memory.sizes import Sizes
from train.config.shapes import element_sizes
from train.strategies.memory import GiB

RESERVED, WHOLE, ALLOCATED, UNKNOWN = "reserved", "whole device", "allocated", "not stated, or of an ambiguous unit"
WORDS = {"max_memory_reserved": RESERVED, "nvidia-smi": WHOLE, "peak_memory_usage": ALLOCATED, "ALLOCATED": ALLOCATED}
V_SHAPED = {"zbv": 1.0, "v-half": 1 / 2, "v-min": 1 / 3}  # microbatches on their way, as a share of 1F1B's


@dataclass(frozen=True)
class Peak:
    """A row's measured peak in GiB, of which kind it is, and log(predicted / measured)."""

    row: Row
    kind: str
    measured: float
    error: float


def kind_of(row: Row) -> str:
    notes = row.cells["notes"]
    return next((kind for word, kind in WORDS.items() if word in notes), UNKNOWN)


def peaks(rows: Sequence[Row]) -> list[Peak]:
    found = []
    for row in rows:
        if measured := row.peak_gib:
            job, kind = job_of(row), kind_of(row)
            error = math.log(predicted(job, row, kind) / GiB / measured) if job else NOT_PREDICTED
            found.append(Peak(row, kind, measured, error))
    return found


def predicted(job: Job, row: Row, kind: str) -> float:
    """Bytes, of the kind that was measured."""
    size = allocated(job, row)
    if kind in (RESERVED, WHOLE):
        size /= 1 - constant("fragmentation")
    return size + outside(job) if kind == WHOLE else size


def allocated(job: Job, row: Row) -> float:
    return max(of_engine(job, row, of_rank(job, rank, engine)) for rank in candidates(job.plan))


def engine(sizes: Sizes) -> Sizes:
    return replace(sizes, compiled=True, gathers_again=sizes.sequence_parallel)


def of_engine(job: Job, row: Row, found: Footprint) -> float:
    plan, kinds = job.plan, dict(found.kinds)
    kinds["pipeline"] = 0.0
    kept, used = element_sizes(plan.config.precision)
    if "unsharded" in kinds and found.rank < plan.world_size // plan.degrees["pp"]:
        model = plan.config.model
        kinds["unsharded"] -= (kept - used) * model.vocab_size * model.dim / plan.degrees["tp"]
    if is_deepspeed(row) and row.precision == "bf16":
        kinds["unsharded"] += kinds["parameters"] * plan.degrees["dp_shard"] * used / kept
    if "offload" in row.cells["zero_or_fsdp"].lower():
        kinds |= {"parameters": kinds["parameters"] * used / kept, "optimiser": 0.0, "gradients": 0.0}
    kinds["activations"] = kinds.get("activations", 0.0) * on_their_way(job, row)
    return sum(kinds.values())


def on_their_way(job: Job, row: Row) -> float:
    """The microbatches on their way in the first stage, as a multiple of 1F1B's."""
    ranks, kind = job.plan.degrees["pp"], schedule(row)
    if kind in V_SHAPED:
        return V_SHAPED[kind]
    if kind.startswith(("zb-2p", "zb-h2")):
        return 2 - 1 / ranks
    return 1 + (ranks - 1) / (ranks * job.chunks) if job.chunks > 1 else 1.0


def fits(row: Row) -> bool | None:
    """Whether the planner says that the row's run fits; None if the job or the device's memory is not known."""
    job = job_of(row)
    if job is None or job.plan.config.hardware.memory_gib is None:
        return None
    return allocated(job, row) + reserve(job) <= job.plan.config.hardware.memory_gib * GiB


def lines(rows: Sequence[Row]) -> list[str]:
    groups: dict[str, list[Peak]] = defaultdict(list)
    for one in peaks(rows):
        for regime in one.row.regimes:
            groups[f"{one.row.source} | {one.row.cells['gpu']} | {regime} | {one.kind}"].append(one)
        said = "all others" if one.kind == UNKNOWN else "all that say what they measured"
        for name in (said, *(() if one.row.defaulted else (f"{said}, no cell blank",))):
            groups[name].append(one)
    width = max(map(len, groups), default=0)
    found = [f"{'error of the peak of memory in %':<{width}}   rows    mean  median     p90    bias"]
    found += [f"{name:<{width}}  {summary(one.error for one in group)}" for name, group in sorted(groups.items())]
    stated = [row for row in rows if row.cells["activation_ckpt"]]
    any_mode = [
        replace(row, cells={**row.cells, "activation_ckpt": row.cells["activation_ckpt"] or "full"}) for row in rows
    ]
    return [
        *found,
        "said to fit, of runs on devices of known memory, which all ran:",
        f"  {share_that_fits(rows)}; of those that state their recomputation {share_that_fits(stated)}; "
        f"if those that do not may have any: {share_that_fits(any_mode)}",
    ]


def share_that_fits(rows: Sequence[Row]) -> str:
    said = [fit for row in rows if (fit := fits(row)) is not None]
    return f"{100 * sum(said) / len(said):.1f} % of {len(said)}" if said else "none"
