"""The key of expert parallelism under `strategy`."""

from __future__ import annotations

from dataclasses import dataclass

from train.config.fields import key
from train.config.strategy import Strategy


@dataclass
class ExpertKeys(Strategy):
    ep: int | None = key(
        None,
        "The degree of expert parallelism: how many of the dp_shard x cp ranks split a layer's experts; -1 means all.",
    )

    def expert_degree(self) -> int | None:
        return self.ep
