"""How often a layer's forward runs again, and so sends again what it sends."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.config.shapes import block
from train.config.technique import Rank
from train.config.traffic import num_layers


def recomputes(plan: Plan) -> bool:
    return plan.config.train.activation_checkpointing is not ActivationCheckpointing.none


def recomputations(rank: Rank) -> int:
    """How many times a layer's forward runs again in a step, over the layers of the rank.

    Once a microbatch under whole backwards. A split one runs it again for the gradients of inputs and, as torch asks
    for them one by one, for the gradient of every parameter; but the first stage, which has no inputs to tell, as a
    whole one.
    """
    plan, strategy, pp = rank.plan, rank.plan.config.strategy, rank.place["pp"]
    if not recomputes(plan):
        return 0
    order = strategy.order(plan.degrees["pp"], plan.num_microbatches) if strategy.splits_backward() else None
    if order is None:
        return plan.num_microbatches * num_layers(plan, rank.place)
    times = {"B": 1, "W": 1 + len(block(plan.config.model))}
    return sum(
        len(plan.layers_of_stages[stage]) * (min(times.get(kind, 0), 1) if stage == 0 else times.get(kind, 0))
        for kind, stage, _ in order.rows[pp]
    )
