"""An embedding tied to the head when they are on different pipeline stages.

    stage 0        embed.weight    look-up      gradient g0 \\
                                                             g0 + g1 on both, so that equal updates keep them equal
    last stage     head.weight     logits       gradient g1 /

Both start from the same value, as initial values follow from global names. Where one rank holds both stages (a V, or one
rank) they share the parameter itself; if FSDP or DDP, which wrap each stage on its own, own it, the head follows: its
gradient is added to the embedding's, and it takes the embedding's value before the next forward. Nothing is sent then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from train.gradients import SharedParameter, local

if TYPE_CHECKING:
    from train.strategies.stages import Stages


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


def tie_stages(stages: Stages, mesh: DeviceMesh) -> Tied:
    """Tie what this rank of the 1-D `mesh` (`pp`) holds. Nothing is sent."""
    embed = next((part.embed for part in stages.parts.values() if part.embed is not None), None)
    head = next((part.head for part in stages.parts.values() if part.head is not None), None)
    if not stages.tied or (embed is None and head is None):
        return Tied()
    if embed is None or head is None:
        weight, peer = (head, stages.first_rank) if embed is None else (embed, stages.last_rank)
        counted = embed is not None
        return Tied(shared=(SharedParameter(weight.weight, mesh.get_group(), peer, counted),))  # type: ignore[union-attr]
    if head.weight is not embed.weight and stages.data_parallel:
        return Tied(pair=(embed.weight, head.weight))  # type: ignore[arg-type]
    head.weight = embed.weight
    return Tied()
