"""Draws layouts as text. Torch is not imported."""

from __future__ import annotations

import itertools
import math

from train.config.strategy import MESH_AXES

MAX_ROWS = 32  # the most ranks or runs in one picture


def draw_mesh(degrees: dict[str, int]) -> str:
    """Ranks by axis: the innermost axis from left to right, the next one downwards, and each outer axis as blocks.

    pp=0
      dp_shard \\ tp   0  1
      0               0  1
      1               2  3
    """
    row, column, blocks = mesh_blocks(degrees)
    if not column:
        return "rank 0 alone"
    corner = f"{row} \\ {column}" if row else column
    width = max(len(str(math.prod(degrees.values()) - 1)), 2) + 1
    lines: list[str] = []
    for title, table in blocks:
        if title:
            lines.append(title)
        lines.append("  " + corner + "".join(f"{i:>{width}}" for i in range(len(table[0]))))
        for i, ranks in enumerate(table):
            lines.append(
                "  " + f"{i if row else 'rank':<{len(corner)}}" + "".join(f"{rank:>{width}}" for rank in ranks)
            )
    return "\n".join(lines)


def mesh_blocks(degrees: dict[str, int]) -> tuple[str, str, list[tuple[str, list[list[int]]]]]:
    """(The axis downwards, the axis across, tables of ranks). Each table has its place on the outer axes: `pp=1`.

    An axis is the empty string if too few axes have a degree above 1.
    """
    used = [axis for axis in MESH_AXES if degrees[axis] > 1]
    *outer, row, column = ["", "", *used] if not used else ["", *used] if len(used) == 1 else used
    across, down = degrees.get(column, 1), degrees.get(row, 1)
    blocks = []
    for block, index in enumerate(itertools.product(*(range(degrees[axis]) for axis in outer))):
        title = " ".join(f"{axis}={i}" for axis, i in zip(outer, index, strict=True))
        firsts = [(block * down + i) * across for i in range(down)]
        blocks.append((title, [list(range(first, first + across)) for first in firsts]))
    return row, column, blocks


def ranges(numbers: list[int]) -> str:
    """`0-3, 6` for 0, 1, 2, 3, 6. Ranks at equal distances are written as `0, 3 … 21`."""
    if len(numbers) > 3 and len({b - a for a, b in itertools.pairwise(numbers)}) == 1 and numbers[1] - numbers[0] > 1:
        return f"{numbers[0]}, {numbers[1]} … {numbers[-1]}"
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in run]
        parts.append(f"{first}-{rest[-1]}" if rest else str(first))
    return ", ".join(parts)
