"""What follows from a config and the number of processes: degrees, data ranks, microbatches. Torch is not imported."""

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
        """The axes that the strategy names, with their degrees as given: -1 means all ranks that are left."""
        return self.config.strategy.mesh_axes()

    @cached_property
    def degrees(self) -> dict[str, int]:
        """Every axis of the mesh with its degree."""
        return resolve_degrees(self.axes, self.world_size)

    @property
    def data_ranks(self) -> int:
        """The number of ranks that read different rows of the global batch."""
        return math.prod(self.degrees[axis] for axis in BATCH_AXES)

    @property
    def num_microbatches(self) -> int:
        """The microbatches of a data rank per optimiser step; 0 if the global batch is too small for one."""
        return self.config.train.global_batch_size // (self.config.train.micro_batch_size * self.data_ranks)

    @property
    def num_stages(self) -> int:
        """The number of pipeline stages; 1 without a pipeline."""
        return self.degrees["pp"] * max(self.config.strategy.num_chunks(), 1)

    @cached_property
    def layers_of_stages(self) -> list[range]:
        """The layers of every pipeline stage; without a pipeline, all layers are in one stage."""
        return self.config.strategy.layers_of(self.config.model, self.config.train.seq_len, self.degrees["pp"])

    @property
    def layers_per_stage(self) -> list[int]:
        return [len(layers) for layers in self.layers_of_stages]

    @property
    def ep(self) -> int:
        """The number of ranks over which a layer's experts are split; 1 if the strategy does not name `ep` or its value
        is not valid."""
        ep = self.config.strategy.expert_degree() or 1
        return folded_ranks(self.degrees) if ep == -1 else max(ep, 1)

    @property
    def splits_experts(self) -> bool:
        """Whether FSDP wraps the experts as separate units: if the strategy names `ep`, even at degree 1."""
        return self.config.strategy.expert_degree() is not None and self.config.model.num_experts > 0

    def keys(self, kind: type[Keys]) -> Keys:
        """The strategy, typed as the dataclass of one technique's keys. Call it only where the technique applies: it
        raises TypeError if the strategy does not have these keys."""
        strategy = self.config.strategy
        if not isinstance(strategy, kind):
            raise TypeError(f"strategy={strategy.name} has no {kind.__name__}")
        return strategy

    def override(self, line: str) -> Plan:
        """The plan after overrides such as "strategy.tp=2 nproc=4". They may set keys and nproc, but not choose
        presets."""
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
    """A copy of nested dataclasses with the value at `path` changed. An enum is given by its value."""
    name, *rest = path
    old = getattr(node, name)
    if rest:
        value = replaced(old, rest, value)
    elif isinstance(old, Enum):
        value = type(old)(value)
    return dataclasses.replace(node, **{name: value})
