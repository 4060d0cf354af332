"""An embedding tied to the head when they are on different pipeline stages.

    stage 0        embed.weight    look-up      gradient g0 \\
                                                             g0 + g1 on both, so that equal updates keep them equal
    last stage     head.weight     logits       gradient g1 /

Both start from the same value, as initial values follow from global names. Where one rank holds both stages (a V, or
one rank) they share the parameter itself; if FSDP or DDP, which wrap each stage on its own, own it, the head follows:
its gradient is added to the embedding's, and it takes the embedding's value before the next forward. Then nothing is
sent, and the head's copy is in no optimiser and no checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from train.ranks.gradients import SharedParameter, local

if TYPE_CHECKING:
    from train.model.transformer import Transformer
    from train.strategies.pipeline.stages import Stages


@dataclass(frozen=True)
class Tied:
    """`shared`: with another rank. `pair`: the embedding's and the head's own copies, both on this rank."""

    shared: tuple[SharedParameter, ...] = ()
    pair: tuple[nn.Parameter, nn.Parameter] | None = None

    @torch.no_grad()
    def follow(self) -> None:
        """Before a forward: the head's copy takes the embedding's value."""
        if self.pair is not None:
            embed, head = self.pair
            local(head).copy_(local(embed))

    @torch.no_grad()
    def sum_pair(self) -> None:
        """After a backward: the embedding's gradient is that of both uses."""
        if self.pair is not None:
            embed, head = self.pair
            assert embed.grad is not None and head.grad is not None
            local(embed.grad).add_(local(head.grad))
            head.grad = None


def tie_stages(stages: Stages, model: Transformer, mesh: DeviceMesh) -> Tied:
    """Tie what this rank of the 1-D `mesh` (`pp`) holds; `model` holds all of it. Nothing is sent."""
    embed, head = cast(Any, model.embed), cast(Any, model.head)
    if not model.config.tie_embeddings or (embed is None and head is None):
        return Tied()
    if embed is None:
        return Tied(shared=(SharedParameter(head.weight, mesh.get_group(), stages.rank_of(0), counted=False),))
    if head is None:
        last = stages.rank_of(stages.num_stages - 1)
        return Tied(shared=(SharedParameter(embed.weight, mesh.get_group(), last, counted=True),))
    if head.weight is not embed.weight and stages.data_parallel:
        return Tied(pair=(embed.weight, head.weight))
    head.weight = embed.weight
    return Tied()
