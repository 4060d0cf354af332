"""How often activation checkpointing runs a layer's forward again, which repeats the messages of that forward."""

from __future__ import annotations

from train.config.plan import Plan
from train.config.schema import ActivationCheckpointing
from train.config.shapes import block
from train.config.technique import Rank
from train.config.traffic import num_layers


def recomputes(plan: Plan) -> bool:
    return plan.config.train.activation_checkpointing is not ActivationCheckpointing.none


def recomputations(rank: Rank) -> int:
    """How many forwards of layers run again in a step, summed over the layers of the rank.

    A whole backward runs each layer's forward again once per microbatch. A split backward does so once for the
    gradients of the inputs, and once for every parameter, because torch computes the parameters' gradients one by one.
    On the first stage, which needs no gradients of inputs, a split backward is like a whole one.
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
