"""What the localisation says. Torch is not imported, so that a page or a table can be made of it at once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """The likely kind of a mistake, recognised from the numbers."""

    factor = "factor"  # the right value times a number, such as a degree or 1 / microbatches
    own_part = "own part only"  # a sum over an axis is missing: a rank has its own term of the sum
    part_missing = "one part missing"  # a sum without the term of one rank or of one microbatch
    counted_again = "counted more than once"  # a norm that counts copies
    positions = "positions"  # the sequence is shifted or permuted, or rotated as if it were
    mask = "mask"  # attention that sees other keys
    stale = "stale"  # the value of another microbatch or rank
    rounding = "rounding"  # the right value with less precision
    decay = "weight decay"
    replicas = "replicas differ"
    unknown = "unknown"


@dataclass(frozen=True)
class Guess:
    """A kind, the axes along which the mistake may be made, and the numbers that speak for it, as words."""

    kind: Kind
    axes: tuple[str, ...] = ()
    because: str = ""


@dataclass(frozen=True)
class Box:
    """A module or a part of the update as the page shows it: its largest error in the forward and in the backward, each
    with what rounding alone may do; None where it is not recorded."""

    name: str
    forward: tuple[float, float] | None = None
    backward: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """The first thing that is wrong.

    `module`: the name of the module, or of the part of the update: loss, gradients, norm, clip, moments, weights,
    evaluate, routing or replicas. `what`: "activation", "gradient" or "update". `tensor`: of which parameter.
    `when`: in or after which step, if it is not the first.
    `axes`: along these axes of the mesh the mistake may be made. `ranks`: those that have a wrong value. `error`,
    `scale`: the largest error, and the largest that rounding explains, both relative to the largest right value.
    """

    module: str
    what: str
    guess: Guess
    ranks: tuple[int, ...]
    error: float
    scale: float
    tensor: str = ""
    when: str = ""

    def sentence(self) -> str:
        where = {"activation": "the output of", "gradient": "the gradient of the output of", "update": "the update:"}
        ranks = f" on rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}" if self.ranks else ""
        axes = f" along {' or '.join(self.guess.axes)}" if self.guess.axes else ""
        because = f" ({self.guess.because})" if self.guess.because else ""
        explained = f"{self.scale:.0e}" if self.scale else "nothing of it"  # copies and counts must be equal
        size = f"error {self.error:.1e}, rounding explains {explained}"
        of = f" of {self.tensor}" if self.tensor else ""
        return (
            f"first wrong{self.when and f' {self.when}'}: {where[self.what]} {self.module}{of}{ranks}, {size}; "
            f"{self.guess.kind.value}{axes}{because}"
        )


@dataclass(frozen=True)
class Search:
    """What a search has seen. `finding`: the first thing that is wrong; None if all that it has seen is right. `boxes`:
    the modules in forward order, with the errors of the first step. `unseen`: names of one device's modules that no
    rank has recorded, so that nothing is known about them."""

    finding: Finding | None
    boxes: tuple[Box, ...] = ()
    unseen: tuple[str, ...] = ()
