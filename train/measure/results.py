"""The results of a run: the names of the values in its records, and how many records become one figure.

A record is a line of metrics.jsonl, or the same values while the run is going on. Four readers use only this module:
the summary of a run, the board of TensorBoard, scripts/compare.py and scripts/benching/results.py.

step       every record except that of an evaluation
recorded   a step that was recorded by the profiler (`metrics.profile_every`), which makes it slower
measured   a step after warm-up that was not recorded; as long as there is none, all steps count as measured

Torch is not imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

from train.config.traffic import LAB
from train.measure.quantiles import Tally, median_interval, quantile

Record = dict[str, float]
Values = Mapping[str, float | None]  # None: the number was not finite

MiB, GiB = 2**20, 2**30
STATE_KINDS = ("parameters", "gradients", "optimiser")
MEMORY_KINDS = (*STATE_KINDS, "activations", "communication", "temporary", "untracked")
COMPUTE_PARTS = ("forward", "backward", "optimiser")
TIME_PARTS = ("data", *COMPUTE_PARTS, "communication", "other")

LOSS, VALIDATION_LOSS, VALID_TOKENS = "train/loss", "validation/loss", "train/valid_tokens"
RECORDED = "time/step_ms"  # a step has this tag if it was recorded
SPEEDS = ("perf/", "cost/")  # tags that are summarised by order statistics
MEMORY, PEAK, BY_RANK, AT_PEAK = "memory/", "memory/peak_", "memory_by_rank/", "memory_at_peak/"
OF_RECORDED = ("time/", "pipeline/", AT_PEAK)  # tags that only recorded steps have
STATE_TAG = re.compile(rf"{BY_RANK}({'|'.join(STATE_KINDS)})_mib/rank_(\d{{1,6}})")
TRAFFIC_TAG = re.compile(r"comm/([\w.]+)/\w+_(mib|exposed_ms)", re.ASCII)


def computed(loss: float, norm: float, lr: float, extras: Record, *, any_target: bool) -> Record:
    """What a step computes, by tag. A step without a target has no loss, and not a loss of 0."""
    none = {} if any_target else {LOSS: math.nan, VALID_TOKENS: 0.0}
    return {LOSS: loss, "train/grad_norm": norm, "train/lr": lr, **extras, **none}


class Results:
    """Every record is added once, in order. The memory that this needs does not grow with the number of steps.

    `step`: the values of the last step. `latest`: the newest value of each tag. `largest`: the largest value of each
    tag of peak memory over all steps, because a device must have room for the first steps too. `settled`: the largest
    value of each tag of memory over the steps after warm-up, or over all steps as long as there are none.
    """

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps, self.num_steps = warmup_steps, 0
        self.num_measured = self.num_recorded = 0  # measured steps; recorded steps, also those in warm-up
        self.step: Values = {}
        self.latest: Record = {}
        self.largest: Record = {}
        self.settled: Record = {}
        self._speeds: dict[str, Tally] = {}
        self._recorded: dict[str, Tally] = {}
        self._recorded_when_warm = False  # whether `_recorded` is from steps after warm-up

    @classmethod
    def of(cls, records: Iterable[Values], warmup_steps: int) -> Results:
        """The results of these records."""
        results = cls(warmup_steps)
        for values in records:
            results.add(values)
        return results

    def add(self, values: Values) -> None:
        """Add the next record."""
        known = {tag: value for tag, value in values.items() if value is not None}
        self.latest |= known
        if VALIDATION_LOSS in values:
            return
        self.num_steps += 1
        self.step = values
        warm = self.num_steps > self.warmup_steps
        if self.num_steps == self.warmup_steps + 1:
            self.settled.clear()
        for tag in (tag for tag in known if tag.startswith(MEMORY)):
            self.settled[tag] = max(known[tag], self.settled.get(tag, known[tag]))
            if tag.startswith(PEAK):
                self.largest[tag] = max(known[tag], self.largest.get(tag, known[tag]))
        self._add_speeds(known, measured=warm and RECORDED not in values)
        if RECORDED in values:
            self._add_recorded(known, warm=warm)

    def _add_speeds(self, known: Record, *, measured: bool) -> None:
        if measured and self.num_measured == 0:  # earlier values count only until the first measured step
            self._speeds.clear()
        self.num_measured += measured
        if measured or self.num_measured == 0:
            for tag, value in known.items():
                if tag.startswith(SPEEDS):
                    self._speeds.setdefault(tag, Tally()).add(value)

    def _add_recorded(self, known: Record, *, warm: bool) -> None:
        """In warm-up only the last recorded step counts, and only until a step after warm-up is recorded."""
        self.num_recorded += 1
        if not (warm and self._recorded_when_warm):
            self._recorded.clear()
        self._recorded_when_warm = warm
        for tag, value in known.items():
            if tag.startswith(OF_RECORDED):
                self._recorded.setdefault(tag, Tally()).add(value)
        if kinds := memory_at_peak(known):
            self._recorded.setdefault(AT_PEAK, Tally()).add(sum(kinds.values()))

    def measured(self, tag: str) -> Tally:
        """The values of a tag of speed or cost in the measured steps."""
        return self._speeds.get(tag, Tally())

    def median(self, tag: str) -> float | None:
        """The median of the tag's values in the measured steps."""
        return quantile(self.measured(tag), 0.5)

    def spread(self) -> dict[str, float]:
        """How much the measured steps varied: percentiles of their time, and a 95 % interval of the median throughput,
        which needs at least six steps. Unknown values are left out."""
        times = self.measured("perf/step_ms")
        low, high = median_interval(self.measured("perf/tokens_per_s"))
        figures = {
            "measured_steps": len(times.ranked()),
            "perf/step_ms_p50": quantile(times, 0.5),
            "perf/step_ms_p95": quantile(times, 0.95),
            "perf/tokens_per_s_ci95_low": low,
            "perf/tokens_per_s_ci95_high": high,
        }
        return {name: value for name, value in figures.items() if value is not None}

    def recorded(self, tag: str) -> Tally:
        """The values of a tag in the recorded steps after warm-up or, if there are none, in the last recorded step of
        the warm-up. The tag AT_PEAK gives the sum over all kinds of memory."""
        return self._recorded.get(tag, Tally())

    def last(self, *prefixes: str) -> Record:
        """The newest value of every tag that begins with one of these prefixes."""
        return {tag: value for tag, value in self.latest.items() if tag.startswith(prefixes)}


def has_no_target(values: Values) -> bool:
    """Whether the step had no valid token, and so no loss."""
    return values.get(VALID_TOKENS) == 0


def state_by_rank(values: Values) -> dict[int, Record]:
    """MiB of parameters, gradients and optimiser state, by rank and kind."""
    ranks: dict[int, Record] = {}
    for tag, value in values.items():
        if value is not None and tag.startswith(BY_RANK) and (match := STATE_TAG.fullmatch(tag)):
            ranks.setdefault(int(match[2]), {})[match[1]] = value
    return dict(sorted(ranks.items()))


def state_mib(values: Values) -> float | None:
    """The sum of parameters, gradients and optimiser state between steps, on the rank where it is largest."""
    return max((sum(kinds.values()) for kinds in state_by_rank(values).values()), default=None)


def memory_at_peak(values: Values) -> Record:
    """MiB by kind at the peak of a recorded step, on the rank whose peak is highest."""
    found = {kind: values.get(f"{AT_PEAK}{kind}_mib") for kind in MEMORY_KINDS}
    return {kind: mib for kind, mib in found.items() if mib is not None}


def time_parts(values: Values) -> Record:
    """The ms of each part of a recorded step. Their sum is the time of the step."""
    found = {part: values.get(f"time/{part}_ms") for part in TIME_PARTS}
    return {part: ms for part, ms in found.items() if ms is not None}


def exposed_pct(parts: Record) -> float | None:
    """The percentage of exposed communication in a recorded step, from its `time_parts`."""
    whole = sum(parts.values())
    return 100 * parts["communication"] / whole if whole and "communication" in parts else None


def by_axis(values: Values, unit: str = "mib") -> Record:
    """What rank 0 sends in a step, by mesh axis, summed over operations. The traffic of the measurements themselves is
    left out. `unit` is mib or, for a recorded step, exposed_ms."""
    axes: Record = {}
    for tag, value in values.items():
        match = TRAFFIC_TAG.fullmatch(tag) if value is not None and tag.startswith("comm/") else None
        if match and value is not None and match[1] != LAB and match[2] == unit:
            axes[match[1]] = axes.get(match[1], 0.0) + value
    return axes
