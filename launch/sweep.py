"""Run every combination, one after another, and compare: python -m launch.sweep strategy=dp,fsdp,tp nproc=4

Takes every override that train/main.py takes, with several values in Hydra's grammar (a,b or range(1,5)), and the
options that --help shows.

All points are checked before the first is started. A point that fails does not end the sweep. The result of each point
and its log are in <metrics.dir>/sweep-<id>/. dry_run=true prints the torchrun line of every point that is left to run.
The exit code is 1 if a point failed, 2 or 3 if nothing was started or a killed rank is still alive, and 130 after
ctrl-C.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.start.alive import sweep_lock, wait_for_ranks
from launch.start.environment import local_environment
from launch.start.torchrun import Start, last_words, torchrun
from launch.sweeping.grid import SCALED, Checked, InvalidPoints, check_all, expand, invalid_lines
from launch.sweeping.points import Entry, State
from launch.sweeping.starting import choose, dry_lines, run_point, runtime_of
from train.command import cli, options
from train.command.launching import nodes
from train.command.planning import auto
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.command.resources import path_of
from train.config.problems import BadInput, Problem
from train.config.world import World
from train.record.run_folder import DONE, FAILED, INVALID


@dataclass(frozen=True)
class Task:
    """The command line, read and checked."""

    checked: list[Checked]
    fairness: str
    bound: int | None
    skip_invalid: bool
    fresh: bool
    dry_run: bool


def main(argv: list[str], start: Start = torchrun) -> int:
    """Run the sweep and return its exit code. `start` runs one point and returns the exit code of its run."""
    with reported_once(World.single()):
        task = read(argv)
        invalid = [one for one in task.checked if one.problems]
        if invalid and (len(invalid) == len(task.checked) or not task.skip_invalid):
            raise InvalidPoints(task.checked, task.fairness)
        plan = next(one.plan for one in task.checked if one.plan and not one.problems)
        bound = task.bound if task.fairness == "best" else None
        state = State.of(Path(plan.config.metrics.dir), task.checked, task.fairness, shlex.join(argv), bound)
        if task.dry_run:
            print("\n".join(dry_run(state, task, invalid)), flush=True)
            return 0
        with sweep_lock(state.folder):
            wait_for_ranks(state.folder)
            state.forget() if task.fresh else state.resume()
            if invalid:
                print("\n".join(["skipped", *invalid_lines(invalid)]))
            try:
                run_all(state, task, start)
            except KeyboardInterrupt:
                done = len(state.with_status(DONE))
                print(
                    f"\nstopped, {done} of {len(state.entries)} done: the same command continues from here", flush=True
                )
                raise SystemExit(128 + signal.SIGINT) from None
    return finish(state)


def read(argv: list[str]) -> Task:
    """Read and check the command line, before any process is started. Raises BadInput."""
    argv = list(argv)
    fairness, bound = options.BATCH.pop(argv), options.MAX_MICRO_BATCH_SIZE.pop(argv)
    fresh, skip, force = (one.pop(argv) for one in (options.FRESH, options.SKIP_INVALID, options.FORCE))
    dry = nodes.DRY_RUN.pop(argv)
    parser = cli.parser(options.SWEEP, __doc__ or "")
    args = parser.parse_intermixed_args(argv)
    if args.help:
        cli.show_help(parser, [auto.stood_in(point.overrides) for point in expand(args.overrides)])
    if args.cfg:
        raise BadInput(Problem("cfg", "--cfg prints one config, but a sweep has several", "use launch.local --cfg job"))
    return Task(_points(parser, args.overrides, fairness, force), fairness, bound, skip, fresh, dry)


def valid(state: State, task: Task) -> list[tuple[Entry, Checked]]:
    """The points that can be run."""
    return [pair for pair in zip(state.entries, task.checked, strict=True) if pair[0].status != INVALID]


def dry_run(state: State, task: Task, invalid: Sequence[Checked]) -> Iterator[str]:
    """What would be run now, in order."""
    if not task.fresh:
        state.resume()
    yield from (f"# {line}" for line in (["skipped", *invalid_lines(invalid)] if invalid else []))
    yield from dry_lines(state, valid(state, task), is_searched=state.fairness == "best", bound=task.bound)


def run_all(state: State, task: Task, start: Start) -> None:
    """Run every point that is not done yet, one after another."""
    todo = valid(state, task)
    done = len(state.with_status(DONE))
    before = f", {done} done before (fresh=true forgets them)" if done else ""
    print(f"{len(todo)} point(s), batch={state.fairness}{before}; logs: {state.folder}/", flush=True)
    notes = dict.fromkeys(runtime_of(one.plan).note for _, one in todo if one.plan)
    notes |= dict.fromkeys(local_environment(1, os.environ)[1])
    print("".join(f"{note}\n" for note in notes if note), end="", flush=True)
    state.save()
    for number, (entry, checked) in enumerate(todo, start=1):
        head = f"[{number}/{len(todo)}] {entry.label}"
        if entry.status == DONE:
            print(f"{head} ... done before{_speed(entry)}", flush=True)
            continue
        if state.fairness == "best":
            print(f"{head}: searching for the largest micro batch", flush=True)
            entry.chosen = choose(state, entry, checked, task.bound, start)
            head += f" {' '.join(entry.chosen)}"
        print(f"{head} ...", end=" ", flush=True)
        if state.fairness == "best" and not entry.chosen:
            assert checked.plan is not None
            entry.status, log = FAILED, entry.probe_log(checked.plan.config.train.micro_batch_size)
        else:
            run_point(state, entry, start)
            log = entry.log
        state.save()
        if entry.status == DONE:
            print(f"{entry.seconds:.1f} s{_speed(entry)}", flush=True)
        else:
            print(f"failed, exit code {entry.exit_code}; the last lines of {state.folder / log}:", flush=True)
            print("\n".join(f"    {line}" for line in last_words(state.folder / log)), flush=True)


def finish(state: State) -> int:
    """Print a summary, compare the finished runs, and return the exit code."""
    done, failed, invalid = (state.with_status(status) for status in (DONE, FAILED, INVALID))
    others = [f"{len(failed)} failed ({', '.join(e.label for e in failed)})"] if failed else []
    others += [f"{len(invalid)} skipped"] if invalid else []
    print("; ".join([f"{len(done)} of {len(state.entries)} point(s) done", *others]), flush=True)
    if done:
        line = [path_of("scripts/compare.py"), *(str(entry.run_dir) for entry in done)]
        print(shlex.join(["python", *line]), flush=True)
        subprocess.run([sys.executable, *line], check=False)
    return 1 if failed else 0


def _points(parser: ArgumentParser, words: list[str], fairness: str, force: bool) -> list[Checked]:
    for key in SCALED[fairness]:
        swept = next((word for word in words if word.startswith(f"{key}=") and len(expand([word])) > 1), None)
        if swept:
            message = f"{swept} is swept, but batch={fairness} sets it"
            raise BadInput(Problem("batch", message, "give one value, from which it starts, or use batch=global"))
    return check_all(parser, expand(words), fairness, force=force)


def _speed(entry: Entry) -> str:
    speed = (entry.summary() or {}).get("perf/tokens_per_s")
    return "" if speed is None else f", {speed:,.0f} tokens/s"


if __name__ == "__main__":
    lasting()
    for number in (
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
    ):  # after these signals the ranks end in order, after others at once
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before the first point
        sys.exit(128 + signal.SIGINT)
