"""All techniques, in the only valid order in which they can be applied.

1. Tensor and expert parallelism decide which part of a weight a rank has, and context parallelism which tokens.
   Distillation replaces the loss between the two.
2. Quantisation-aware training rounds the inputs and the weights of linear layers, and so do products in 8 bits.
3. Activation checkpointing wraps the computation that results, so that its backward repeats exactly this.
4. Compilation wraps both.
5. What a layer keeps is offloaded outside compiled code, and the loss in chunks calls the loss that results, also a
   compiled one.
6. Data parallelism comes last: its hooks need the final parameters of each block, and must run outside compiled code.

Pipeline parallelism and DeepSpeed do not change a model: the strategies' `build` uses them. They are in this list for
their rules and closed forms.
"""

from __future__ import annotations

from train.config.plan import Plan
from train.config.shapes import coordinates
from train.config.technique import Rank, Technique
from train.strategies.chunked_loss.technique import CHUNKED_LOSS
from train.strategies.compile.technique import COMPILE
from train.strategies.context.technique import CONTEXT
from train.strategies.data.technique import DDP, FSDP
from train.strategies.deepspeed.technique import DEEPSPEED
from train.strategies.distil.technique import DISTIL
from train.strategies.expert.technique import EXPERT
from train.strategies.float8.technique import FLOAT8
from train.strategies.offload.technique import OFFLOAD
from train.strategies.pipeline.technique import PIPELINE
from train.strategies.quantise.technique import QUANTISE
from train.strategies.recompute.technique import RECOMPUTE
from train.strategies.tensor.technique import TENSOR

TECHNIQUES = (
    TENSOR,
    DISTIL,
    CONTEXT,
    EXPERT,
    QUANTISE,
    FLOAT8,
    RECOMPUTE,
    COMPILE,
    OFFLOAD,
    CHUNKED_LOSS,
    FSDP,
    DDP,
    PIPELINE,
    DEEPSPEED,
)


def used(plan: Plan) -> tuple[Technique, ...]:
    """The techniques that apply to the plan."""
    return tuple(one for one in TECHNIQUES if one.applies(plan))


def rank_of(plan: Plan, rank: int, like: Rank | None = None) -> Rank:
    """The rank of the plan with this number, which knows its part of every parameter. `like`: this rank of another plan
    that splits parameters in the same way; what was found for one of them is known to both."""
    here = Rank(plan, coordinates(plan, rank), used(plan))
    return here if like is None else like.of(here)
