"""Layouts as pictures in text. Torch is not imported."""

from __future__ import annotations

import itertools
import math

from train.strategies.base import MESH_AXES


def draw_mesh(degrees: dict[str, int]) -> str:
    """Ranks by axis: the innermost axis left to right, the next one down, and outer axes as blocks.

    pp=0
      dp_shard \\ tp   0  1
      0               0  1
      1               2  3
    """
    used = [axis for axis in MESH_AXES if degrees[axis] > 1]
    if not used:
        return "rank 0 alone"
    *outer, row, column = ["", *used] if len(used) == 1 else used
    across, down = degrees[column], degrees.get(row, 1)
    corner = f"{row} \\ {column}" if row else column
    width = max(len(str(math.prod(degrees.values()) - 1)), 2) + 1
    lines: list[str] = []
    for block, index in enumerate(itertools.product(*(range(degrees[axis]) for axis in outer))):
        if index:
            lines.append(" ".join(f"{axis}={i}" for axis, i in zip(outer, index, strict=True)))
        lines.append("  " + corner + "".join(f"{i:>{width}}" for i in range(across)))
        for i in range(down):
            first = (block * down + i) * across
            ranks = "".join(f"{rank:>{width}}" for rank in range(first, first + across))
            lines.append("  " + f"{i if row else 'rank':<{len(corner)}}" + ranks)
    return "\n".join(lines)


def ranges(numbers: list[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3, 6, and every third rank as `0, 3 … 21`."""
    if len(numbers) > 3 and len({b - a for a, b in itertools.pairwise(numbers)}) == 1 and numbers[1] - numbers[0] > 1:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in run]
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ", ".join(parts)
