"""What the summary of a run needs of its steps, in memory that does not grow with them."""

from __future__ import annotations

from train.measure.quantiles import Tally

Record = dict[str, float]
MEASURED = ("perf/", "cost/")  # tags of which the summary gives order statistics


class History:
    """Every step is added once. `step`: the values of the last one. `latest`: the newest value of each tag. `largest`:
    of each tag of peak memory."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps, self.num_steps = warmup_steps, 0
        self.step: Record = {}
        self.latest: Record = {}
        self.largest: Record = {}
        self.steady = False  # whether there is a step after warm-up that was not recorded
        self._tallies: dict[str, Tally] = {}

    def add(self, values: Record) -> None:
        """The values of the next step."""
        self.num_steps += 1
        self.step = values
        self.latest |= values
        self.largest |= {
            tag: max(value, self.largest.get(tag, value))
            for tag, value in values.items()
            if tag.startswith("memory/") and "peak" in tag
        }
        steady = self.num_steps > self.warmup_steps and "time/step_ms" not in values
        if steady and not self.steady:  # the steps before count only while there is no better one
            self.steady = True
            self._tallies.clear()
        if steady or not self.steady:
            for tag, value in values.items():
                if tag.startswith(MEASURED):
                    self._tallies.setdefault(tag, Tally()).add(value)

    def measured(self, tag: str) -> Tally:
        """The tag's values in the steps after warm-up that were not recorded, or in all if there are no such."""
        return self._tallies.get(tag, Tally())

    def last(self, *prefixes: str) -> Record:
        """The newest value of every tag with such a beginning."""
        return {tag: value for tag, value in self.latest.items() if tag.startswith(prefixes)}
