"""The keys of context parallelism under `strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import key
from train.config.strategy import Strategy

CP_METHODS = ("allgather", "ring", "ulysses")


@dataclass
class ContextKeys(Strategy):
    cp: int | None = key(None, "The degree of context parallelism: ranks that share the tokens of every sequence.")
    cp_method: str = key(
        "allgather",
        "How attention sees the keys and values of other ranks: allgather gathers them, ring passes them on from rank "
        "to rank, ulysses exchanges tokens for heads.",
        choices=CP_METHODS,
    )
