"""The contract of a technique, such as tensor parallelism: everything that the lab asks of it, as one object.

`train/strategies/techniques.py` has all of them in one ordered tuple. Applying, rules, traffic and held bytes are loops
over it, and each technique's folder holds all that answers. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from train.config.plan import Keys, Plan
from train.config.rule import Rule
from train.config.shapes import Shape, shard
from train.config.strategy import Strategy
from train.config.traffic import Traffic

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    from train.config.schema import Config
    from train.model.transformer import Transformer


@dataclass(frozen=True)
class Split:
    """A rank's part of one dimension of a parameter: of `degree` equal chunks the one with number `index`."""

    dim: int
    degree: int
    index: int


@dataclass(frozen=True)
class Rank:
    """A rank of a plan: its place on every axis of the mesh, and its part of every parameter."""

    plan: Plan
    place: dict[str, int]
    techniques: tuple[Technique, ...]  # those that apply

    def computes(self, name: str, shape: Shape) -> Shape:
        """What the rank computes with of a parameter with this global name and whole shape."""
        return self._part(name, shape, gathered=True)

    def holds(self, name: str, shape: Shape) -> Shape:
        """What the rank holds of it between steps."""
        return self._part(name, shape, gathered=False)

    def stored_split(self, name: str) -> Split | None:
        """The split that is undone while the parameter is used, as FSDP gathers it; None where there is none."""
        found = (one.split(self, name) for one in self.techniques if one.gathers and one.split is not None)
        return next((split for split in found if split is not None), None)

    def _part(self, name: str, shape: Shape, *, gathered: bool) -> Shape:
        for technique in self.techniques:
            split = None if technique.split is None or (gathered and technique.gathers) else technique.split(self, name)
            if split is not None:
                shape = shard(shape, split.dim, split.degree, split.index)
        return shape


@dataclass
class Target:
    """What techniques change, one after the other: a model on meta, or a stage of one.

    `wrapped`: what is called instead of the model. `meshes`: made by one technique, and shared with others and with the
    other stages of this rank. `fsdp_units`: modules inside a layer that FSDP shards over a mesh of their own, with the
    placement of each parameter. `mask_axes`: axes along which ranks draw other dropout masks, as they hold other
    activations. `fill(module, prefix)` gives a module memory and its initial values.
    """

    model: Transformer
    mesh: DeviceMesh
    config: Config
    wrapped: nn.Module
    fill: Callable[[nn.Module, str], None]
    meshes: dict[str, DeviceMesh | None]
    mask_axes: set[str]
    fsdp_units: dict[nn.Module, tuple[DeviceMesh, Callable[[nn.Parameter], Shard]]] = field(default_factory=dict)
    filled: bool = False

    def fill_once(self) -> None:
        """Give the whole model memory and its initial values, unless that is done."""
        if not self.filled:
            self.filled = True
            self.fill(self.model, "")

    def keys(self, kind: type[Keys]) -> Keys:
        return Plan(self.config, self.mesh.size()).keys(kind)


Traffics = Callable[[Rank], Iterator[Traffic]]


@dataclass(frozen=True)
class Technique:
    """One technique. What is None or empty, it has nothing of.

    `name`: as messages say it, and `axes`: the axes of the mesh that make the strategy use it.
    `keys`: the dataclass of the strategy's keys that belong to it; its options have an effect only where it applies.
    `applies(plan)`: whether the strategy names its axis or option, at degree 1 too. What follows is asked only then.
    `rules`: between its keys, the other groups and the number of processes.
    `split(rank, name)`: the rank's part of the parameter with this global name. `gathers`: it is put together again
    while the parameter is used.
    `traffic(rank)`: what the rank sends for it in one optimiser step.
    `apply(target)`: changes the model. It imports torch when it is called. None: the strategy's `build` does it.
    """

    name: str
    axes: tuple[str, ...]
    keys: type[Strategy]
    applies: Callable[[Plan], bool]
    rules: tuple[Rule, ...] = ()
    split: Callable[[Rank, str], Split | None] | None = None
    gathers: bool = False
    traffic: Traffics | None = None
    apply: Callable[[Target], None] | None = None
