"""How many layers each stage of a pipeline gets: splits near the one that is balanced by FLOPs.

That one counts matrix products only. The last stage also computes the loss, the first one looks up the embedding and
keeps the activations of most microbatches, and efficiency depends on shapes. Which of these splits is best is decided
by predicted time and memory (search.py).
"""

from __future__ import annotations

from collections.abc import Sequence

FIRST, LAST = (-1, 0, 1), (-2, -1, 0, 1, 2)  # layers more than balanced, on the first and on the last stage


def splits(balanced: Sequence[int]) -> list[tuple[int, ...]]:
    """Splits of the same layers, the balanced one first; without a pipeline, one that is empty."""
    if not balanced:
        return [()]
    total, stages = sum(balanced), len(balanced)
    found = [tuple(balanced), even(total, stages)]
    for more in LAST:
        last = balanced[-1] + more
        if stages == 2:
            found.append((total - last, last))
            continue
        mean = round((total - last) / (stages - 1))
        for extra in FIRST:
            first = mean + extra
            found.append((first, *reversed(even(total - first - last, stages - 2)), last))
    return [split for split in dict.fromkeys(found) if min(split) >= 1]


def even(total: int, stages: int) -> tuple[int, ...]:
    """As equal as possible; the first ones have one more."""
    base, extra = divmod(total, stages)
    return tuple(base + (i < extra) for i in range(stages))
