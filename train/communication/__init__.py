"""What a strategy must send, in closed form: calls and bytes by axis and operation, per optimiser step and rank.

Torch is not imported. Bytes follow nccl-tests' convention, as the ledger's do; forward, backward and update together.
Sources are in docs/communication.md. One file per technique; B, T, D, V as in `model.py`, m microbatches.
"""

from __future__ import annotations

from train.communication.base import LAB, Total, Traffic, degree_of, depends_on_schedule, num_actions, totals
from train.communication.context import context
from train.communication.data import ddp, fsdp
from train.communication.expert import experts
from train.communication.pipeline import pipeline
from train.communication.scalars import scalars
from train.communication.tensor import tensor
from train.plan import Plan
from train.shapes import coordinates
from train.strategies.timetable import most_actions

__all__ = ["LAB", "Total", "Traffic", "expected", "totals", "unknown"]


def expected(plan: Plan, rank: int = 0) -> list[Traffic]:
    """Everything that this rank sends in one optimiser step. Axes of degree 1 send nothing."""
    place = coordinates(plan, rank)
    techniques = (tensor, context, experts, fsdp, ddp, pipeline, scalars)
    rows = [row for technique in techniques for row in technique(plan, place)]
    return [row for row in rows if degree_of(plan, row.axis) > 1 and row.calls]


def unknown(plan: Plan) -> str | None:
    """Why this plan has no closed form: then `expected` must not be asked."""
    if not plan.config.strategy.closed_form:
        return f"what strategy={plan.config.strategy.name} sends is not known before it runs"
    most = most_actions(plan.option("schedule", ""))
    if depends_on_schedule(plan) and (actions := num_actions(plan)) > most:
        return (
            f"it follows from the order of {actions:,} forwards and backwards, of which {most:,} are replayed at most"
        )
    return None
