"""Stores what the ranks of a run have recorded, and finds the first thing that is wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from train.config.plan import Plan
from train.proof.collecting import Watch
from train.proof.comparison import Evidence
from train.proof.locating.activations import Activations
from train.proof.locating.finding import Finding
from train.proof.locating.layout import Sizes
from train.proof.locating.reference import Reference
from train.proof.locating.trace import Trace
from train.proof.locating.updates import Updates
from train.ranks.state import Piece


@dataclass(frozen=True)
class Run:
    """A run of the proof with what all its ranks have recorded. `held`: [rank][step][piece]."""

    evidence: Evidence
    traces: list[Trace]
    held: list[list[list[Piece]]]


def save_run(path: Path, rank: int, evidence: Evidence, watch: Watch) -> None:
    """Store what this rank has recorded in a file whose name begins with `path`; rank 0 stores the evidence too."""
    kept = (watch.trace, watch.held, evidence if rank == 0 else None)
    torch.save(kept, path.with_name(f"{path.name}.rank_{rank}"))


def load_run(path: Path, world_size: int) -> Run:
    """What `save_run` has stored. The files are the lab's own: they are loaded as pickles."""
    kept = [torch.load(path.with_name(f"{path.name}.rank_{rank}"), weights_only=False) for rank in range(world_size)]
    return Run(kept[0][2], [trace for trace, _, _ in kept], [held for _, held, _ in kept])


def locate(plan: Plan, found: Path, right: Path, moved: Path) -> Finding | None:
    """The first wrong activation in forward order; else the first wrong gradient of one in backward order; else the
    first wrong part of the update; None if all is right. The files are those of the strategy, of one device, and of one
    device with moved inputs."""
    one, other, run = load_run(right, 1), load_run(moved, 1), load_run(found, plan.world_size)
    reference = Reference(one.traces[0], other.traces[0], plan.config)
    activations = Activations(
        reference, run.traces, Sizes(plan.degrees, plan.config.train.seq_len, plan.ep), plan.num_microbatches
    )
    lossy = plan.config.strategy.lossy()
    updates = Updates(
        found=run.evidence,
        right=one.evidence,
        moved=other.evidence,
        held=run.held,
        right_held=one.held[0],
        moved_held=other.held[0],
        reference=reference,
        plan=plan,
        lossy=(lossy and lossy.bound) or 0.0,
        activations=activations,
    )
    return activations.first_wrong() or updates.first_wrong()
