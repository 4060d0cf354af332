"""The traffic of a step's single numbers: the count of valid tokens (int64), the loss and the gradient's norm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from train.config.shapes import element_sizes, units
from train.config.technique import Rank
from train.config.traffic import Traffic, loss_size


def scalars(rank: Rank) -> Iterator[Traffic]:
    plan, loss = rank.plan, loss_size(rank.plan)
    for axis in ("dp_replicate", "dp_shard"):
        if axis in plan.axes:
            yield Traffic(axis, "all_reduce", 2, 8 + loss, "scalars: valid tokens, loss")
    if "cp" in plan.axes:
        yield Traffic("cp", "all_reduce", 1, loss, "scalars: loss")
    kept, _ = element_sizes(plan.config.precision)
    for axis, calls in norm(rank).items():
        yield Traffic(axis, "all_reduce", calls, calls * kept, "scalars: gradient norm")
    if "pp" in plan.axes:
        yield Traffic("pp", "all_reduce", 2, kept + loss, "scalars: gradient norm, loss")


def norm(rank: Rank) -> Counter[str]:
    """The number of all-reduces of the gradient's norm, by axis. Gradients that are split over the same groups are
    summed together; one all-reduce over each of these groups completes the sum."""
    names = (name for _, unit in units(rank.plan, rank.place["pp"]) for name in unit)
    alike = dict.fromkeys(rank.split_axes(name) for name in names)
    return Counter(axis for axes in alike for axis in axes)
