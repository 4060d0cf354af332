"""How a point of a sweep is started, the short runs that find its micro batch, and the lines of both for a dry run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from launch.start.alive import wait_for_ranks
from launch.start.environment import torchrun_line
from launch.start.torchrun import Start
from launch.sweeping.grid import GLOBAL, MICRO, Checked
from launch.sweeping.points import Entry, State
from train.command.overrides import with_quotes
from train.config.plan import Plan
from train.config.world import World
from train.record.run_folder import DONE, FAILED, PROBES, RUNNING

if TYPE_CHECKING:  # it imports torch
    from train.ranks.distributed import Runtime

PROBE = (
    "train.steps=9",
    "train.eval_every=0",
    "train.eval_batches=1",
    "metrics.warmup_steps=3",  # the ledger counts in the third step
    "metrics.tensorboard=false",
    "metrics.profile_every=0",
    "metrics.trace=false",  # it needs a recorded step
)
MAX_ON_CPU = 64  # sequences per micro batch
GAIN = 1.03  # on a CPU, a larger micro batch must be faster by this factor


def run_point(state: State, entry: Entry, start: Start) -> None:
    """Run a point, and settle its status."""
    wait_for_ranks(state.folder)
    words = words_of(entry)
    entry.discard(state.folder, but_saved="checkpoint.resume=never" not in words)
    entry.status, entry.run_dir, entry.exit_code = RUNNING, None, None
    (state.folder / entry.run_file).unlink(missing_ok=True)
    state.save()
    began = time.monotonic()
    entry.exit_code = start(words, entry.nproc, state.folder / entry.log, state.folder / entry.run_file)
    entry.seconds = time.monotonic() - began
    entry.settle(state.folder)
    if entry.status != DONE:
        entry.status = FAILED


def words_of(entry: Entry) -> list[str]:
    """The overrides of the run of a point."""
    return [*entry.overrides, *entry.chosen, *saving(entry.overrides)]


def saving(overrides: Sequence[str]) -> list[str]:
    """A sweep measures, so its runs save nothing, unless they are told to."""
    return [] if any(word.startswith("checkpoint.") for word in overrides) else ["checkpoint.every=0"]


def dry_lines(
    state: State, pairs: Sequence[tuple[Entry, Checked]], *, is_searched: bool, bound: int | None
) -> Iterator[str]:
    """The torchrun line of each point that is left to run, in order, below a comment with its label. `is_searched`:
    short runs find the micro batches first, up to `bound`; the next of them is shown."""
    for number, (entry, checked) in enumerate(pairs, start=1):
        head = f"# [{number}/{len(pairs)}] {entry.label}"
        if entry.status == DONE:
            yield f"{head}: done before (fresh=true forgets it)"
            continue
        if is_searched and not entry.chosen:
            assert checked.plan is not None
            missing: list[int] = []

            def known(size: int, entry: Entry = entry, missing: list[int] = missing) -> float | None:
                missing += [] if str(size) in entry.tried else [size]
                return entry.tried.get(str(size))

            size = best_micro_batch(known, *limits(checked, bound))
            if missing:
                yield f"{head}: a short run; larger micro batches follow, as long as they run and pay"
                yield _shown(words_of(probe_of(state, entry, checked, missing[0])), entry.nproc)
                head += ": N is the micro batch that they find"
                found = [f"{MICRO}=N", f"{GLOBAL}={checked.plan.data_ranks * checked.microbatches}*N"]
            elif size is None:
                yield f"{head}: no micro batch ran"
                continue
            else:
                found = checked.sized(size)
            entry = replace(entry, chosen=found)
        yield head
        yield _shown(words_of(entry), entry.nproc)


def _shown(words: Sequence[str], nproc: int) -> str:
    return shlex.join(["torchrun", *torchrun_line(words, nproc)])


def probe_of(state: State, entry: Entry, checked: Checked, micro_batch: int) -> Entry:
    """A short run of a point with another micro batch."""
    words = [*PROBE, f"metrics.dir={with_quotes(str(state.folder / PROBES))}", *checked.sized(micro_batch)]
    kept = [word for word in entry.overrides if not word.startswith("checkpoint.")]
    return Entry(entry.label, [*kept, *words], entry.nproc, entry.probe_log(micro_batch))


def choose(state: State, entry: Entry, checked: Checked, bound: int | None, start: Start) -> list[str]:
    """The overrides of the best micro batch; empty if not even the given one runs. Sizes in `tried` are not measured
    again."""

    def measure(micro_batch: int) -> float | None:
        if str(micro_batch) not in entry.tried:
            probe = probe_of(state, entry, checked, micro_batch)
            run_point(state, probe, start)
            summary = probe.summary()
            entry.exit_code = probe.exit_code
            entry.tried[str(micro_batch)] = None if summary is None else float(summary["perf/tokens_per_s"])
            state.save()
        speed = entry.tried[str(micro_batch)]
        print(f"      {micro_batch}: {'does not run' if speed is None else f'{speed:,.0f} tokens/s'}", flush=True)
        return speed

    found = best_micro_batch(measure, *limits(checked, bound))
    return checked.sized(found) if found else []


def limits(checked: Checked, bound: int | None) -> tuple[int, int | None, bool]:
    """The first size of a search, the largest, and whether it ends at the first size that does not pay."""
    assert checked.plan is not None
    on_cpu = runtime_of(checked.plan).device.type == "cpu"
    return checked.plan.config.train.micro_batch_size, bound or (MAX_ON_CPU if on_cpu else None), on_cpu


def best_micro_batch(
    measure: Callable[[int], float | None], first: int, bound: int | None, until_slower: bool
) -> int | None:
    """The largest of first, 2 first, 4 first … up to `bound` that runs; None if none runs. `measure` returns tokens/s,
    or None if the size does not run.

    `until_slower`: stop at the first size that is not faster by 3 % than the size before, which is then the best.
    """
    best, speed, size = None, 0.0, first
    while bound is None or size <= max(bound, first):
        measured = measure(size)
        if measured is None or (until_slower and measured < speed * GAIN):
            break
        best, speed, size = size, measured, 2 * size
    return best


def runtime_of(plan: Plan) -> Runtime:
    """The device and backend that the ranks will use. This imports torch."""
    from train.ranks.distributed import choose_runtime

    size = plan.world_size
    return choose_runtime(plan.config.runtime, World(0, 0, size, size, from_torchrun=True))
