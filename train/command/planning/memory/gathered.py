"""What FSDP gathers at the moments of a step, and the gradients that it has not reduced yet. Bytes of one stage.

In a forward, a layer's parameters are copied out of the message that gathered them, and the message stays until the
next layer's copy. In a backward, the next layer's message is on its way, and the layer before is being reduced: its
gradients are in a buffer in the dtype of reductions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from train.config.shapes import Shapes, element_sizes, units_by_stage
from train.config.technique import Rank
from train.strategies.data.split import padded
from train.strategies.data.traffic import frees


@dataclass(frozen=True)
class Unit:
    """What FSDP gathers at once. `gathered`: bytes of the parameters in use, `reduced`: of their gradients when they
    are reduced, `shard`: of the rank's part of these. `several`: whether more than one rank shares it."""

    gathered: float = 0.0
    reduced: float = 0.0
    shard: float = 0.0
    several: bool = False

    def __add__(self, other: Unit) -> Unit:
        return Unit(
            self.gathered + other.gathered,
            self.reduced + other.reduced,
            self.shard + other.shard,
            self.several or other.several,
        )

    @property
    def message(self) -> float:
        return self.gathered if self.several else 0.0


NOTHING = Unit()


@dataclass(frozen=True)
class Gathered:
    """The units of a stage. `frees`: whether a layer's parameters are freed between its forward and its backward.
    `once`: whether gradients are reduced after the last microbatch only. `stays`: whether what a backward gathers stays
    until the next forward, as in a pipeline. `tied`: whether the head's unit has the embedding too, whose backward is
    the last."""

    embed: Unit
    layer: Unit
    head: Unit
    num_layers: int
    frees: bool
    once: bool
    stays: bool
    tied: bool

    @property
    def everything(self) -> float:
        return self.embed.gathered + self.num_layers * self.layer.gathered + self.head.gathered

    @property
    def unreduced(self) -> float:
        return self.embed.reduced + self.num_layers * self.layer.reduced + self.head.reduced

    def forward(self, unit: Unit, *, fresh: bool) -> float:
        """While the unit computes. The head's parameters stay, also those that are tied to the embedding. `fresh`:
        whether the parameters are gathered in this forward."""
        if not self.frees or (self.stays and unit is self.embed and not fresh):
            return self.everything + unit.message * fresh
        return (unit.gathered if unit is not self.head else 0.0) + self.head.gathered + unit.message

    def loss(self, *, stayed: bool = False) -> float:
        return self.head.gathered if self.frees and not stayed else self.everything

    def head_backward(self, *, stayed: bool) -> float:
        """While the head's backward runs: the last layer's parameters are on their way."""
        return self.loss(stayed=stayed) + (self.layer.message if self.frees and not stayed else 0.0)

    def layer_backward(self, *, top: bool, last: bool) -> float:
        """While a layer's backward runs, apart from its own gradients. `last`: whether this backward frees what it does
        not need any more."""
        bottom = self.num_layers == 1 or not top
        waits = self.once or (top and self.tied)
        reducing = 0.0 if waits else (self.head.reduced if top else self.layer.reduced)
        tied = self.head.gathered if self.tied else 0.0
        if last and not self.frees:
            left = self.everything - self.head.gathered if top else self.embed.gathered + self.layer.gathered
            return left + reducing + tied
        if not self.frees or (self.stays and not top):
            return self.everything + reducing
        after = self.embed.message if bottom else self.layer.message
        return self.layer.gathered + after + reducing + tied

    def last_reduction(self) -> float:
        """When all gradients are reduced after the last backward, as in a pipeline. A unit's parameters are freed
        before its gradients are copied."""
        new = max(unit.reduced - unit.gathered for unit in (self.embed, self.layer, self.head))
        return self.everything + self.unreduced + new

    def reduction(self, unit: Unit, after: Unit) -> float:
        """While a unit's gradients are put into the buffer of their reduction. `after`: the unit that the backward
        comes to next."""
        low = unit.gathered
        rest = after.message if self.frees else self.everything - unit.gathered
        return rest + low + unit.reduced


def gathered_of(rank: Rank, stage: int) -> Gathered:
    plan = rank.plan
    strategy = plan.config.strategy
    found = {"embed": NOTHING, "layer": NOTHING, "head": NOTHING}
    freed = strategy.frees_parameters()
    for of, name, shapes in units_by_stage(plan, rank.place["pp"], copies=True, first_layers=True):
        if of == stage:
            kind = "head" if "head" in name else "embed" if name == "embed" else "layer"
            found[kind] = unit_of(rank, name, shapes)
            freed = freed and (kind != "layer" or frees(plan, name))
    layers = len(plan.layers_of_stages[stage])
    tied = plan.config.model.tie_embeddings and plan.num_stages == 1
    scheduled = strategy.schedule_name() is not None
    once = scheduled or (strategy.reduces_once() and plan.num_microbatches > 1)
    return Gathered(found["embed"], found["layer"], found["head"], layers, freed, once, scheduled, tied)


def unit_of(rank: Rank, name: str, shapes: Shapes) -> Unit:
    """The unit with these parameters. It is computed once for all layers, as they are split alike."""
    kind = "layer" if name.startswith("layers.") else name
    key = ("unit", kind, rank.plan.config.precision, *shapes.values())
    return rank.once(key, lambda: _unit_of(rank, name, shapes))


def _unit_of(rank: Rank, name: str, shapes: Shapes) -> Unit:
    precision = rank.plan.config.precision
    kept, used = element_sizes(precision)
    size = kept if name.startswith("embed") else used
    reduced = 4 if precision.casts else kept
    total = NOTHING
    for key, shape in shapes.items():
        elements, part = padded(rank, key, shape), math.prod(rank.holds(key, shape))
        split = rank.stored_split(key)
        several = split is not None and split.degree > 1
        total += Unit(float(elements * size), float(elements * reduced), float(part * kept), several)
    return total
