"""Stores what the ranks of a run have recorded, and finds the first thing that is wrong in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from train.config.plan import Plan
from train.proof.collecting import Watch
from train.proof.comparison import Evidence
from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding, Search
from train.proof.locating.layout import Sizes
from train.proof.locating.reference import SLACK, Reference
from train.proof.locating.update.adamw import LATER, AdamW
from train.proof.locating.update.evaluation import evaluation
from train.proof.locating.update.updates import Updates


@dataclass(frozen=True)
class Run:
    """A run of the proof with what all its ranks have recorded."""

    evidence: Evidence
    ranks: list[Watch]


def save_run(path: Path, rank: int, evidence: Evidence, watch: Watch) -> None:
    """Store what this rank has recorded in a file whose name begins with `path`; rank 0 stores the evidence too."""
    torch.save((watch, evidence if rank == 0 else None), path.with_name(f"{path.name}.rank_{rank}"))


def load_run(path: Path, world_size: int) -> Run:
    """What `save_run` has stored. The files are the lab's own: they are loaded as pickles."""
    kept = [torch.load(path.with_name(f"{path.name}.rank_{rank}"), weights_only=False) for rank in range(world_size)]
    return Run(kept[0][1], [watch for watch, _ in kept])


def locate(plan: Plan, found: Path, right: Path, moved: Path) -> Search:
    """The first wrong activation in forward order; else the first wrong gradient of one in backward order; else the
    first wrong part of the update. The files are those of the strategy, of one device, and of one device with moved
    inputs.

    It looks at the first step (SGD), then at what AdamW's first step leaves, at an evaluation, at AdamW's second step,
    and at what its last step leaves. With a teacher nothing is looked for: what a loss should be is known for the
    cross-entropy only.
    """
    if plan.config.train.teacher is not None:
        return Search(None, (), ("loss",))
    one, other, run = load_run(right, 1), load_run(moved, 1), load_run(found, plan.world_size)
    first = activations_of(plan, "trace", run, one, other)
    updates = Updates(run.evidence, one.evidence, other.evidence, plan, first)
    adamw = AdamW(updates, run.ranks, one.ranks[0], other.ranks[0])

    def findings() -> Iterator[Finding | None]:
        yield first.first_wrong()
        yield updates.sums()
        yield adamw.wrong_copies()
        yield updates.step()
        if not plan.config.precision.casts:  # there, rounding would explain almost any error in later steps
            yield said(adamw.first_wrong(0), "after the first AdamW step")
            yield evaluation(updates, activations_of(plan, "evaluated", run, one, other, updates.lossy))
            second = activations_of(plan, "second", run, one, other, updates.lossy)
            yield said(adamw.second_step(second), "in the second AdamW step")
            yield said(adamw.first_wrong(-1), "after the last AdamW step")
        yield updates.last()

    seen = first.names()
    unseen = tuple(name for name in first.reference.order if name not in seen)
    return Search(next((finding for finding in findings() if finding is not None), None), first.boxes(), unseen)


def said(finding: Finding | None, when: str) -> Finding | None:
    """The finding of a later step, which says when."""
    return None if finding is None else replace(finding, when=when)


def activations_of(plan: Plan, which: str, run: Run, right: Run, moved: Run, lossy: float = 0.0) -> Activations:
    """The activations of one of the traces that a `Watch` has. `lossy`: see `Reference`."""
    first = which == "trace"
    slack = SLACK if first else SLACK * LATER
    traces = getattr(right.ranks[0], which), getattr(moved.ranks[0], which)
    reference = Reference(*traces, plan.config, first, slack, lossy)
    sizes = Sizes(plan.degrees, plan.config.train.seq_len, plan.ep)
    return Activations(reference, [getattr(watch, which) for watch in run.ranks], sizes, plan.num_microbatches)
