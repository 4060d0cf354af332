"""What a config comes to in a world of a given size: degrees, data ranks, microbatches. Torch is not imported."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any, TypeVar

import yaml

from train.config.schema import Config
from train.config.strategy import BATCH_AXES, Strategy, folded_ranks, resolve_degrees

Keys = TypeVar("Keys", bound=Strategy)


@dataclass(frozen=True)
class Plan:
    config: Config
    world_size: int

    @cached_property
    def axes(self) -> dict[str, int]:
        """The axes that the strategy names, as given: -1 is the ranks that are left."""
        return self.config.strategy.mesh_axes()

    @cached_property
    def degrees(self) -> dict[str, int]:
        """Every axis of the mesh with its degree."""
        return resolve_degrees(self.axes, self.world_size)

    @property
    def data_ranks(self) -> int:
        """Ranks that read different rows of the global batch."""
        return math.prod(self.degrees[axis] for axis in BATCH_AXES)

    @property
    def num_microbatches(self) -> int:
        """Forwards per data rank and optimiser step; 0 if not even one fits."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.data_ranks)

    @property
    def num_stages(self) -> int:
        """Of the pipeline; 1 without one."""
        return self.degrees["pp"] * max(self.config.strategy.num_chunks(), 1)

    @cached_property
    def layers_of_stages(self) -> list[range]:
        """The layers of every stage of a pipeline; without one they are all in one stage."""
        return self.config.strategy.layers_of(self.config.model, self.config.train.seq_len, self.degrees["pp"])

    @property
    def layers_per_stage(self) -> list[int]:
        return [len(layers) for layers in self.layers_of_stages]

    @property
    def ep(self) -> int:
        """Ranks that share a layer's experts; 1 where the strategy names none or no valid number."""
        ep = self.config.strategy.expert_degree() or 1
        return folded_ranks(self.degrees) if ep == -1 else max(ep, 1)

    @property
    def splits_experts(self) -> bool:
        """Whether experts are units of FSDP of their own: where the strategy names `ep`, at degree 1 too."""
        return self.config.strategy.expert_degree() is not None and self.config.model.num_experts > 0

    def keys(self, kind: type[Keys]) -> Keys:
        """The strategy as the dataclass of one technique's keys. TypeError for a strategy that has none of them: this
        is asked only where the technique applies."""
        strategy = self.config.strategy
        if not isinstance(strategy, kind):
            raise TypeError(f"strategy={strategy.name} has no {kind.__name__}")
        return strategy

    def override(self, line: str) -> Plan:
        """The plan after overrides such as "strategy.tp=2 nproc=4" (values only: no preset is switched)."""
        config, world_size = self.config, self.world_size
        for word in line.split():
            key, _, text = word.partition("=")
            value = yaml.safe_load(text)
            if key == "nproc":
                world_size = value
            else:
                config = replaced(config, key.split("."), value)
        return Plan(config, world_size)


def replaced(node: Any, path: list[str], value: Any) -> Any:
    """A copy of nested dataclasses with the value at `path` changed; enums by value."""
    name, *rest = path
    old = getattr(node, name)
    if rest:
        value = replaced(old, rest, value)
    elif isinstance(old, Enum):
        value = type(old)(value)
    return dataclasses.replace(node, **{name: value})
