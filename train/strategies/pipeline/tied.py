"""An embedding tied to the head when they are on different pipeline stages.

    stage 0        embed.weight    look-up      gradient g0 \\
                                                             g0 + g1 on both, so that equal updates keep them equal
    last stage     head.weight     logits       gradient g1 /

Both start from the same value, because initial values depend on global names only. If one rank holds both stages (in a
V, or with pp=1), they share the parameter itself. FSDP and DDP do not allow this, because they wrap each stage on its
own: then the head's gradient is added to the embedding's, and the embedding's value is copied to the head before the
next forward. Nothing is sent, and the head's copy is in no optimiser and in no checkpoint.
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
    """`shared`: the parameters that another rank shares. `pair`: the copies of the embedding and of the head, if both
    are on this rank."""

    shared: tuple[SharedParameter, ...] = ()
    pair: tuple[nn.Parameter, nn.Parameter] | None = None

    @torch.no_grad()
    def follow(self) -> None:
        """Copy the embedding's value to the head. Call it before a forward."""
        if self.pair is not None:
            embed, head = self.pair
            local(head).copy_(local(embed))

    @torch.no_grad()
    def sum_pair(self) -> None:
        """Add the head's gradient to the embedding's. Call it after a backward."""
        if self.pair is not None:
            embed, head = self.pair
            assert embed.grad is not None and head.grad is not None
            local(embed.grad).add_(local(head.grad))
            head.grad = None


def tie_stages(stages: Stages, model: Transformer, mesh: DeviceMesh) -> Tied:
    """Tie the embedding and the head, as far as this rank of the 1-D `mesh` (`pp`) holds them. `model` has the modules
    of all of the rank's stages. Nothing is sent."""
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
