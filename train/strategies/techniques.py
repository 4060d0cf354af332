"""All techniques, in the only valid order of applying them.

1. Tensor and expert parallelism decide what a weight is; context parallelism which tokens a rank has.
2. Recomputation is around what a block computes then.
3. Compilation is around both.
4. Data parallelism is last: its hooks must see the parameters of finished blocks, outside compiled code.

A pipeline and DeepSpeed are no changes of a model: their strategies' `build` uses them. They stand here for their rules
and closed forms.
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.shapes import coordinates
from train.config.technique import Rank, Technique
from train.strategies.compile.technique import COMPILE
from train.strategies.context.technique import CONTEXT
from train.strategies.data.technique import DDP, FSDP
from train.strategies.deepspeed.technique import DEEPSPEED
from train.strategies.expert.technique import EXPERT
from train.strategies.pipeline.technique import PIPELINE
from train.strategies.recompute.technique import RECOMPUTE
from train.strategies.tensor.technique import TENSOR

TECHNIQUES = (TENSOR, CONTEXT, EXPERT, RECOMPUTE, COMPILE, FSDP, DDP, PIPELINE, DEEPSPEED)


def used(plan: Plan) -> tuple[Technique, ...]:
    """Those that apply to the plan."""
    return tuple(one for one in TECHNIQUES if one.applies(plan))


def rank_of(plan: Plan, rank: int) -> Rank:
    """A rank of the plan, by its number, with its part of every parameter."""
    return Rank(plan, coordinates(plan, rank), used(plan))
