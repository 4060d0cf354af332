"""The traffic that a strategy must send, in closed form: calls and bytes by axis and operation, per step and rank.

Torch is not imported. Bytes follow nccl-tests' convention, as in the ledger, and include forward, backward and update.
The sources are in docs/communication.md. Each technique's folder has its own part. B, T, D and V are those of
`transformer.py`, and m is the number of microbatches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from train.config.plan import Plan
from train.config.technique import Rank, Technique
from train.config.traffic import Traffic, degree_of
from train.strategies.data.traffic import gathers_by_schedule
from train.strategies.pipeline.timetable import most_actions
from train.strategies.recompute.traffic import recomputes
from train.strategies.scalars import scalars
from train.strategies.techniques import rank_of


def expected_traffic(plan: Plan, rank: int = 0) -> list[Traffic]:
    """All that this rank sends in one optimiser step. Nothing is sent over axes of degree 1."""
    here = rank_of(plan, rank)
    return sent(here, [*of_techniques(here, here.techniques), *scalars(here)])


def of_techniques(here: Rank, techniques: Iterable[Technique]) -> Iterator[Traffic]:
    return (row for technique in techniques if technique.traffic for row in technique.traffic(here))


def sent(here: Rank, rows: Iterable[Traffic]) -> list[Traffic]:
    """The rows without those over axes of degree 1."""
    return [row for row in rows if degree_of(here.plan, row.axis) > 1 and row.calls]


def depends_on_schedule(plan: Plan) -> bool:
    """Whether a rank's traffic depends on the order of its forwards and backwards, and not on their number only."""
    return gathers_by_schedule(plan) or (recomputes(plan) and plan.config.strategy.splits_backward())


def unknown_traffic(plan: Plan) -> str | None:
    """The reason why `expected_traffic` is not known for this plan; None if it is known."""
    strategy = plan.config.strategy
    if not strategy.closed_form:
        return f"what strategy={strategy.name} sends is not known before it runs"
    most, actions = most_actions(strategy.schedule_name() or ""), num_actions(plan)
    if depends_on_schedule(plan) and actions > most:
        return f"it depends on the order of {actions:,} forwards and backwards, of which at most {most:,} are replayed"
    return None


def num_actions(plan: Plan) -> int:
    """The number of forwards and backwards of a step on all ranks of `pp`."""
    return 2 * plan.num_microbatches * plan.num_stages
