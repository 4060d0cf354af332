"""Along which axes of the mesh ranks differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from train.config.strategy import MESH_AXES

RankPlace = Mapping[str, int]  # a rank's place on every axis of the mesh


def separating_axes(pairs: Iterable[tuple[RankPlace, RankPlace]]) -> tuple[str, ...]:
    """The axes along which two places differ, of those pairs that differ along the fewest: they say most. Empty if
    there is no pair."""
    apart = [[axis for axis in MESH_AXES if one[axis] != other[axis]] for one, other in pairs]
    fewest = min(map(len, apart), default=0)
    return tuple(dict.fromkeys(axis for axes in apart if len(axes) == fewest for axis in axes))
