"""Where ranks are: which host has which, for any order of the mesh's axes, and which axes cross hosts.

An order lists axes from inside a host outward. The lab's own order is that of MESH_AXES, in which neighbours along `tp`
are neighbours in a host. In another order the same ranks do the same work, in other hosts.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from train.command.launching.network import Order
from train.config.problems import BadInput, Problem
from train.config.strategy import MESH_AXES

USUAL: Order = tuple(reversed(MESH_AXES))


def full_order(given: Order | None, degrees: Mapping[str, int]) -> Order:
    """The axes of which the mesh has more than one rank, in this order; None for the usual one. Raises BadInput if it
    names other axes."""
    used = [axis for axis in USUAL if degrees[axis] > 1]
    if given is None:
        return tuple(used)
    if {*given} != {*used}:
        message = f"order={'.'.join(given)} does not name the axes of this mesh, {'.'.join(used) or 'which has none'}"
        raise BadInput(Problem("order", message, f"use order={'.'.join(used)}, or these in another order"))
    return given


def hosts_of_ranks(degrees: Mapping[str, int], order: Order, nodes: int) -> list[int]:
    """The host of each rank."""
    per_node = math.prod(degrees[axis] for axis in MESH_AXES) // nodes
    places = [*itertools.product(*(range(degrees[axis]) for axis in MESH_AXES))]  # of the ranks, in their order
    found = []
    for place in places:
        at, slot = dict(zip(MESH_AXES, place, strict=True)), 0
        for axis in reversed(order):
            slot = slot * degrees[axis] + at[axis]
        found.append(slot // per_node)
    return found


@dataclass(frozen=True)
class Edges:
    """The edges of the rings of all groups over some axes: the most that lead out of one host, and the most that stay
    in one."""

    out: int
    inside: int


def edges_of(degrees: Mapping[str, int], axes: Sequence[str], hosts: Sequence[int], *, closed: bool = True) -> Edges:
    """The members of a group are in the order of their ranks. `closed`: whether the last sends to the first."""
    out: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    for members in _groups(degrees, axes, hosts):
        following = [*members[1:], *(members[:1] if closed else [])]
        for a, b in zip(members, following, strict=False):
            (inside if a == b else out)[a] += 1
    return Edges(max(out.values(), default=0), max(inside.values(), default=0))


def pairs_of(degrees: Mapping[str, int], axes: Sequence[str], hosts: Sequence[int]) -> Edges:
    """The same if each member sends to every other one."""
    out: Counter[int] = Counter()
    inside: Counter[int] = Counter()
    for members in _groups(degrees, axes, hosts):
        for a, b in itertools.permutations(members, 2):
            (inside if a == b else out)[a] += 1
    return Edges(max(out.values(), default=0), max(inside.values(), default=0))


def _groups(degrees: Mapping[str, int], axes: Sequence[str], hosts: Sequence[int]) -> list[list[int]]:
    """The hosts of the members of each group of more than one rank."""
    places = itertools.product(*(range(degrees[axis]) for axis in MESH_AXES))
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank, place in enumerate(places):
        outside = tuple(i for axis, i in zip(MESH_AXES, place, strict=True) if axis not in axes)
        groups.setdefault(outside, []).append(hosts[rank])
    return [members for members in groups.values() if len(members) > 1]


def crossing_axes(degrees: Mapping[str, int], hosts: Sequence[int]) -> list[str]:
    """The axes along which some messages go to another host, from inner to outer."""
    return [axis for axis in USUAL if edges_of(degrees, [axis], hosts).out]
