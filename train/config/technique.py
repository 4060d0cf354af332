"""The contract of a technique, such as tensor parallelism: one object with everything that the lab needs from it.

`train/strategies/techniques.py` has all techniques in one ordered tuple. Loops over this tuple apply a strategy, check
its rules, and compute its traffic and its memory. All code of a technique is in its own folder. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from train.config.plan import Keys, Plan
from train.config.rule import Rule
from train.config.rules.idle import Table
from train.config.shapes import Shape, shard
from train.config.strategy import Strategy
from train.config.traffic import Traffic

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Shard

    from train.config.schema import Config
    from train.model.transformer import Transformer

Found = TypeVar("Found")


@dataclass(frozen=True)
class Split:
    """A rank's part of one dimension of a parameter: the dimension is cut into `degree` equal chunks, and the rank has
    the chunk with number `index`. `axis`: the name of the group whose ranks have the other chunks."""

    dim: int
    degree: int
    index: int
    axis: str


@dataclass(frozen=True)
class Rank:
    """A rank of a plan: its place on every axis of the mesh, and its part of every parameter.

    All layers are split alike, so that what is found for a parameter of one layer is kept for the others.
    """

    plan: Plan
    place: dict[str, int]
    techniques: tuple[Technique, ...]  # those that apply
    _parts: dict[tuple[str, Shape, bool], Shape] = field(default_factory=dict, compare=False, repr=False)
    _splits: dict[str, tuple[tuple[Technique, Split], ...]] = field(default_factory=dict, compare=False, repr=False)
    _known: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def of(self, other: Rank) -> Rank:
        """`other`, whose plan splits parameters in the same way, with what is known of this rank's parts."""
        return replace(other, _parts=self._parts, _splits=self._splits, _known=self._known)

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """What `find` returns. It is called once for all plans that split parameters in the same way, and `key` must
        name everything else on which the result depends."""
        if key not in self._known:
            self._known[key] = find()
        found: Found = self._known[key]
        return found

    def computes(self, name: str, shape: Shape) -> Shape:
        """The shape of the rank's part of a parameter while it is used. `name` is its global name, `shape` its whole
        shape."""
        return self._part(name, shape, gathered=True)

    def holds(self, name: str, shape: Shape) -> Shape:
        """The shape of the rank's part of the parameter between steps."""
        return self._part(name, shape, gathered=False)

    def split_axes(self, name: str) -> tuple[str, ...]:
        """The groups over whose ranks the parameter is split."""
        return tuple(split.axis for _, split in self._found(name))

    def stored_split(self, name: str) -> Split | None:
        """The split that is undone while the parameter is used, for example because FSDP gathers it; None if there is
        none."""
        return next((split for technique, split in self._found(name) if technique.gathers), None)

    def _part(self, name: str, shape: Shape, *, gathered: bool) -> Shape:
        key = (_within_layer(name), shape, gathered)
        if key not in self._parts:
            for technique, split in self._found(name):
                if not (gathered and technique.gathers):
                    shape = shard(shape, split.dim, split.degree, split.index)
            self._parts[key] = shape
        return self._parts[key]

    def _found(self, name: str) -> tuple[tuple[Technique, Split], ...]:
        """The splits of the parameter, in the order of the techniques."""
        key = _within_layer(name)
        if key not in self._splits:
            asked = ((one, one.split(self, name)) for one in self.techniques if one.split is not None)
            self._splits[key] = tuple((one, split) for one, split in asked if split is not None)
        return self._splits[key]


def _within_layer(name: str) -> str:
    """The name of a parameter without the number of its layer."""
    return name.split(".", 2)[2] if name.startswith("layers.") else name


@dataclass
class Target:
    """What the techniques change, one after the other: a model on the meta device, or one stage of it.

    `wrapped`: the module that is called instead of the model. `meshes`: device meshes that one technique makes and that
    others, and the other stages of this rank, use too. `fsdp_units`: modules inside a layer that FSDP shards over a
    mesh of their own, with the placement of each parameter. `mask_axes`: axes along which ranks draw different dropout
    masks, because they hold different activations. `fill(module, prefix)` allocates a module's memory and sets its
    initial values.
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
        """Allocate the whole model's memory and set its initial values, unless this has been done."""
        if not self.filled:
            self.filled = True
            self.fill(self.model, "")

    def keys(self, kind: type[Keys]) -> Keys:
        return Plan(self.config, self.mesh.size()).keys(kind)


Traffics = Callable[[Rank], Iterator[Traffic]]


@dataclass(frozen=True)
class Technique:
    """One technique. A field that is None or empty means that the technique has no such part.

    `name`: its name in messages. `axes`: the axes of the mesh that belong to it.
    `keys`: the dataclass of the strategy's keys that belong to it. Its options have an effect only where it applies.
    `applies(plan)`: whether the strategy names its axis or option, even at degree 1. The lab uses the fields below only
    for plans to which the technique applies.
    `rules`: the rules between its keys, the other groups and the number of processes.
    `split(rank, name)`: the rank's part of the parameter with this global name. `gathers`: whether the whole parameter
    is gathered while it is used.
    `traffic(rank)`: what the rank sends for this technique in one optimiser step.
    `read_when`: its options that have an effect only with certain values of other keys, for rules and for comparisons.
    `apply(target)`: changes the model. It imports torch when it is called. None: the strategy's `build` does this.
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
    read_when: Table = field(default_factory=dict)
