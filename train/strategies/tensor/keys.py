"""The keys of tensor parallelism under `strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import key
from train.config.strategy import Strategy


@dataclass
class TensorKeys(Strategy):
    tp: int | None = key(
        None, "The degree of tensor parallelism: ranks that split heads, feed-forward columns and the vocabulary."
    )
    sequence_parallel: bool = key(
        True, "Whether activations between blocks are sharded over the tokens too (Korthikanti et al. 2022)."
    )
    loss_parallel: bool = key(
        True, "Whether the loss is computed from shards of the vocabulary, so that logits are never gathered."
    )
    async_tp: bool = key(
        False,
        "Whether gathers and scatters run in pieces beside the matrix products that need them; "
        "this requires compile.enabled=true and NCCL.",
    )

    def shards_sequence(self) -> bool:
        return self.tp is not None and self.sequence_parallel

    def shards_logits(self) -> bool:
        return self.tp is not None and self.loss_parallel

    def needed_backend(self) -> tuple[str, str] | None:
        return ("nccl", "async_tp") if self.async_tp else None
