"""What a strategy must send, in closed form: calls and bytes by axis and operation, per optimiser step and rank.

Torch is not imported. Bytes follow nccl-tests' convention, as the ledger's do; forward, backward and update together.
Sources are in docs/communication.md. Each technique's folder has its own part; B, T, D, V as in `transformer.py`, and m
is the number of microbatches.
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.traffic import Traffic, degree_of
from train.strategies.data.traffic import gathers_by_schedule
from train.strategies.pipeline.timetable import most_actions
from train.strategies.recompute.traffic import recomputes
from train.strategies.scalars import scalars
from train.strategies.techniques import rank_of


def expected_traffic(plan: Plan, rank: int = 0) -> list[Traffic]:
    """Everything that this rank sends in one optimiser step. Axes of degree 1 send nothing."""
    here = rank_of(plan, rank)
    rows = [row for technique in here.techniques if technique.traffic for row in technique.traffic(here)]
    return [row for row in (*rows, *scalars(here)) if degree_of(plan, row.axis) > 1 and row.calls]


def depends_on_schedule(plan: Plan) -> bool:
    """Whether what a rank sends follows from the order of its forwards and backwards, not from their numbers alone."""
    return gathers_by_schedule(plan) or (recomputes(plan) and plan.config.strategy.splits_backward())


def unknown_traffic(plan: Plan) -> str | None:
    """Why this plan has no closed form: then `expected_traffic` must not be asked."""
    strategy = plan.config.strategy
    if not strategy.closed_form:
        return f"what strategy={strategy.name} sends is not known before it runs"
    most, actions = most_actions(strategy.schedule_name() or ""), num_actions(plan)
    if depends_on_schedule(plan) and actions > most:
        return (
            f"it follows from the order of {actions:,} forwards and backwards, of which {most:,} are replayed at most"
        )
    return None


def num_actions(plan: Plan) -> int:
    """Forwards and backwards of a step, over all ranks of `pp`."""
    return 2 * plan.num_microbatches * plan.num_stages
