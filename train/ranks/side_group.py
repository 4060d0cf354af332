"""The group for the lab's own small messages, such as metrics: gloo, apart from the groups of the strategy."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from train.config.traffic import LAB
from train.config.world import World


class SideGroup:
    """The ranks of the world in a gloo group of their own. Making it and every method are collective: all ranks must
    call them. In a world of one rank nothing is sent."""

    def __init__(self, world: World, *, alone: bool = False) -> None:
        """`alone`: whether a world of one rank has a group too."""
        self.world = world
        several = world.world_size > 1
        self.group = dist.new_group(backend="gloo", group_desc=LAB) if several or alone else None

    def barrier(self) -> None:
        if self.group is not None:
            dist.barrier(self.group)

    def exchange(self, figures: list[float]) -> list[list[float]]:
        """The figures of every rank, on every rank. Each rank must give equally many."""
        if self.group is None:
            return [figures]
        own = torch.tensor(figures, dtype=torch.float64)
        parts = [torch.empty_like(own) for _ in range(self.world.world_size)]
        dist.all_gather(parts, own, group=self.group)
        return [part.tolist() for part in parts]

    def gather_json(self, value: Any) -> list[Any] | None:
        """The values of every rank, on rank 0; None on other ranks. They are sent as JSON, so nothing is unpickled."""
        if self.group is None:
            return [value]
        own = self._padded(value)
        parts = [torch.empty_like(own) for _ in range(self.world.world_size)] if self.world.rank == 0 else None
        dist.gather(own, parts, group=self.group)
        return None if parts is None else [json.loads(bytes(part.numpy())) for part in parts]

    def exchange_json(self, value: Any) -> list[Any]:
        """The values of every rank, on every rank."""
        if self.group is None:
            return [value]
        own = self._padded(value)
        parts = [torch.empty_like(own) for _ in range(self.world.world_size)]
        dist.all_gather(parts, own, group=self.group)
        return [json.loads(bytes(part.numpy())) for part in parts]

    def _padded(self, value: Any) -> torch.Tensor:
        """The value as JSON, with spaces up to the length of the longest rank's."""
        text = json.dumps(value).encode()
        longest = torch.tensor(len(text))
        dist.all_reduce(longest, dist.ReduceOp.MAX, group=self.group)
        return torch.frombuffer(bytearray(text.ljust(int(longest))), dtype=torch.uint8)

    def share_json(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return json.loads(self.share(json.dumps(value)))

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
