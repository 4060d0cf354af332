"""What a strategy must send, in closed form: calls and bytes by axis and operation, per optimiser step and rank.

Torch is not imported. Bytes follow nccl-tests' convention, as the ledger's do; forward, backward and update together.
Sources are in docs/communication.md. One file per technique; B, T, D, V as in `model.py`, m microbatches.
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.shapes import coordinates
from train.config.traffic import LAB, Total, Traffic, degree_of, depends_on_schedule, num_actions, totals
from train.strategies.context.traffic import context
from train.strategies.data.traffic import ddp, fsdp
from train.strategies.expert.traffic import experts
from train.strategies.pipeline.timetable import most_actions
from train.strategies.pipeline.traffic import pipeline
from train.strategies.scalars import scalars
from train.strategies.tensor.traffic import tensor

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
