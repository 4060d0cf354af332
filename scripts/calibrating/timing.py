"""Times of operations on this rank's device: medians of many, with a budget, and with all ranks at work at once."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from train.measure.hardware import Clock
from train.ranks.side_group import SideGroup

Run = Callable[[], object]
LEAST, MOST = 3, 40  # timed repetitions of one operation
POINT_S = 0.25  # the time that repetitions of one operation may take, if there are more than LEAST
CACHE_BYTES = 2**27  # more than the last cache of any accelerator; writing them leaves nothing of the inputs in it


class Stopwatch:
    """Collective: every rank makes one and measures the same operations in the same order, so that what ranks share
    (memory, power, links) is shared while it is measured too.

    `left_out`: names of what was not measured because the budget was used up.
    """

    def __init__(self, device: torch.device, side_group: SideGroup, budget_s: float) -> None:
        self.device, self.side_group, self.clock = device, side_group, Clock(device)
        self.budget_s = self.end_s = budget_s
        self.left_out: list[str] = []
        self.cache = None if device.type == "cpu" else torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)
        self._wait()  # the start of a device takes seconds, which are none of the budget's
        self.started = time.perf_counter()

    def anywhere(self, on_this_rank: bool) -> bool:
        """Whether something is so on any rank."""
        return any(row[0] for row in self.side_group.exchange([float(on_this_rank)]))

    def until(self, share: float) -> None:
        """From now on, operations are measured until this share of the whole budget is used up."""
        self.end_s = share * self.budget_s

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What runs inside, such as a compilation, does not use up the budget."""
        start = time.perf_counter()
        yield
        self._wait()
        self.started += time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def spans(self, name: str, parts: Sequence[Run]) -> list[float] | None:
        """The median seconds of each part; the parts run one after another in each repetition. None if the budget is
        used up, the same on every rank."""
        if self.anywhere(time.perf_counter() - self.started > self.end_s):
            self.left_out.append(name)
            return None
        self._repeat(parts)  # libraries choose their kernels, and memory is allocated
        first = self._repeat(parts)
        whole = max(row[0] for row in self.side_group.exchange([sum(first)]))
        count = int(min(max(POINT_S / max(whole, 1e-6), LEAST), MOST))
        rows = self._repeated(parts, count)
        return [statistics.median(column) for column in zip(*rows, strict=True)]

    def seconds(self, name: str, run: Run) -> float | None:
        found = self.spans(name, [run])
        return None if found is None else found[0]

    def _repeat(self, parts: Sequence[Run]) -> list[float]:
        return self._repeated(parts, 1)[0]

    def _repeated(self, parts: Sequence[Run], count: int) -> list[list[float]]:
        """The host does not wait between repetitions, so that an accelerator never waits for it."""
        self.side_group.barrier()
        marks = []
        for _ in range(count):
            if self.cache is not None:
                self.cache.zero_()
            row = [self.clock.mark()]
            for part in parts:
                part()
                row.append(self.clock.mark())
            marks.append(row)
        return [[self.clock.elapsed_ms(start, end) / 1e3 for start, end in pairwise(row)] for row in marks]

    def mean(self, seconds: float) -> float:
        """The mean over all ranks, the same on every rank."""
        return statistics.mean(row[0] for row in self.side_group.exchange([seconds]))

    def slowest(self, seconds: float) -> float:
        """The longest time of all ranks, the same on every rank."""
        return max(row[0] for row in self.side_group.exchange([seconds]))
