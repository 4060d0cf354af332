"""This rank's rows of the global batches, on its device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.fields import IGNORE_INDEX
from train.config.schema import Config
from train.data.corpus import Corpus
from train.ranks.distributed import own_rows


class Batches:
    """Every rank has the same number of rows, in whole microbatches. Where the ranks cannot share the batch evenly, as
    when some were lost (`runtime.elastic`), the last ranks get rows without valid targets in addition: these change
    neither the loss nor the gradients, which are divided by the number of valid targets."""

    def __init__(self, config: Config, corpus: Corpus, mesh: DeviceMesh, device: torch.device) -> None:
        self.corpus, self.device, self.size = corpus, device, config.train.global_batch_size
        self.num_validation = config.train.eval_batches
        self.rows = own_rows(mesh, self.size, multiple=config.train.micro_batch_size)

    def training(self, step: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of this step, [rows, T] each. The copy to an accelerator may not have ended yet."""
        return self._filled(*self.corpus.batch(step, self.size, self.rows), non_blocking=True)

    def any_target(self, step: int) -> bool:
        """Whether any target of this step's global batch contributes to the loss."""
        return self.corpus.any_target(step, self.size)

    def validation(self, index: int) -> tuple[Tensor, Tensor]:
        """(tokens, targets) of one of the `num_validation` validation batches, [rows, T] each."""
        return self._filled(*self.corpus.validation_batch(index, self.num_validation, self.size, self.rows))

    def _filled(self, tokens: Tensor, targets: Tensor, *, non_blocking: bool = False) -> tuple[Tensor, Tensor]:
        missing = self.rows.stop - self.rows.start - len(tokens)
        if missing:
            shape = (missing, tokens.shape[1])
            tokens = torch.cat([tokens, tokens.new_zeros(shape)])
            targets = torch.cat([targets, targets.new_full(shape, IGNORE_INDEX)])
        return tokens.to(self.device, non_blocking=non_blocking), targets.to(self.device, non_blocking=non_blocking)
