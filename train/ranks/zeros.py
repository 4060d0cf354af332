"""Entries of matrices that are 0 when training starts, and stay 0: those of a pruned model (`train.keep_zeros`).

Everything is elementwise on local shards, so that nothing is sent, and every layout does the same. The frozen entries
are exactly those that are 0: an entry that an update would make 0 by chance becomes the smallest normal number instead.
So a run that goes on from a checkpoint, also on another layout, finds the same entries again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.ranks.gradients import local
from train.ranks.optim import decays


class KeptZeros:
    """The frozen entries of this rank's shards. They are looked for before the first update, as the parameters from
    which a run starts are filled in after its step is built. They take one byte for each entry of a matrix that has
    some."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.matrices = [p for p in parameters if decays(p)]
        self.frozen: list[Tensor | None] | None = None

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set the gradients of frozen entries to 0. Call it when gradients are complete, before their norm is taken."""
        for p, frozen in zip(self.matrices, self._found(), strict=True):
            if frozen is not None and p.grad is not None:
                local(p.grad).masked_fill_(frozen, 0.0)

    @torch.no_grad()
    def after_update(self) -> None:
        """Make the entries that are 0 those that are frozen, whatever the optimiser has kept from before."""
        for p, frozen in zip(self.matrices, self._found(), strict=True):
            weight = local(p)
            weight.masked_fill_(weight == 0, torch.finfo(weight.dtype).tiny)
            if frozen is not None:
                weight.masked_fill_(frozen, 0.0)

    def _found(self) -> list[Tensor | None]:
        if self.frozen is None:
            zeros = [local(p.detach()) == 0 for p in self.matrices]
            self.frozen = [one if bool(one.any()) else None for one in zeros]
        return self.frozen
