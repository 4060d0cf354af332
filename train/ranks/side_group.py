"""The lab's own traffic between ranks: small, on a gloo group of its own, so that no strategy's group carries it."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from train.config.traffic import LAB
from train.config.world import World


class SideGroup:
    """Collective: every rank makes one and calls the same methods. In a world of one nothing is sent."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.group = dist.new_group(backend="gloo", group_desc=LAB) if world.world_size > 1 else None

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def gather(self, figures: list[float]) -> list[list[float]] | None:
        """Every rank's figures, as many on each, on rank 0; None elsewhere."""
        if self.group is None:
            return [figures]
        own = torch.tensor(figures, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(self.world.world_size)] if self.world.rank == 0 else None
        dist.gather(own, parts, group=self.group)
        return None if parts is None else [part.tolist() for part in parts]

    def gather_json(self, value: Any) -> list[Any] | None:
        """Every rank's value on rank 0, as JSON's bytes (nothing is unpickled); None elsewhere."""
        if self.group is None:
            return [value]
        text = json.dumps(value).encode()
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        own = torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.world.world_size)] if self.world.rank == 0 else None
        dist.gather(own, parts, group=self.group)
        return None if parts is None else [json.loads(bytes(part.numpy())) for part in parts]

    def share(self, text: str) -> str:
        """Rank 0's text on every rank."""
        if self.group is None:
            return text
        size = torch.tensor(len(text.encode()))
        dist.broadcast(size, 0, group=self.group)
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if self.world.rank == 0 else None
        buffer = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        dist.broadcast(buffer, 0, group=self.group)
        return bytes(buffer.numpy()).decode()
