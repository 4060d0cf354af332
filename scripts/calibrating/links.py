"""Measure messages between ranks: torchrun --nproc_per_node=2 scripts/calibrating/links.py sizes=4096,4194304

Every collective of each size in bytes, in groups of every power of two of neighbouring ranks and in the whole world.
All groups of one size send at the same time. It prints microseconds, medians of many, from the slowest rank, and the
bit rate of a ring's busiest edge. ops=all_reduce,send chooses operations, budget_s=60 limits the time, device=cpu
chooses the device, and out=FILE writes the rows as JSON. late_ms=2 makes the last rank of each group start 2 ms after
the others, as in training, and times this rank alone. launch.netlab runs it between the hosts of an emulated cluster.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.calibrating.messages import Groups, message_rows
from scripts.calibrating.timing import Stopwatch
from train.command.planning.links import edge_bytes
from train.command.planning.profile import OPS
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config.plain_json import dumps
from train.config.problems import BadInput, Problem
from train.config.schema import RuntimeConfig
from train.config.world import World
from train.ranks.distributed import choose_runtime, process_group
from train.ranks.side_group import SideGroup
from train.record.run_files import write_whole

SIZES = (4096, 2**16, 2**20, 2**22)
MOST_BYTES, MOST_S = 2**30, 86_400


@dataclass(frozen=True)
class Task:
    sizes: tuple[int, ...] = SIZES
    ops: tuple[str, ...] = OPS
    budget_s: int = 120
    device: str = "auto"
    out: str = ""
    late_ms: int = 0


def main(argv: Sequence[str]) -> None:
    leave_on_interrupt()
    if {*argv} & {"-h", "--help"}:
        print(__doc__)
        return
    with reported_once(World.single(), trains=False):
        world = World.from_env()
        bind_to_parents(world)
    with reported_once(world, trains=False):
        task = read(argv)
        config = RuntimeConfig(device=task.device, timeout_s=max(300.0, float(task.budget_s)))
        runtime = choose_runtime(config, world)
        with process_group(runtime, world, config.timeout_s):
            rows, left_out = measured(task, world, runtime.device)
        if world.rank == 0:
            print("\n".join(lines(rows)), flush=True)
            if left_out:
                print(f"left out, as budget_s={task.budget_s} was used up: {'; '.join(left_out)}", flush=True)
            if task.out:
                write_whole(
                    Path(task.out), dumps({"world_size": world.world_size, "rows": rows, "left_out": left_out}) + "\n"
                )


def read(argv: Sequence[str]) -> Task:
    """Raises BadInput for a wrong word."""
    readers: dict[str, Callable[[str], object]] = {
        "sizes": lambda text: tuple(_whole(part, MOST_BYTES) for part in text.split(",")),
        "ops": lambda text: tuple(text.split(",")),
        "budget_s": lambda text: _whole(text, MOST_S),
        "device": str,
        "out": str,
        "late_ms": lambda text: _whole(text, 1000 * MOST_S),
    }
    values: dict[str, Any] = {}
    for word in argv:
        key, _, text = word.partition("=")
        if key not in readers:
            raise BadInput(Problem("word", f"{word} is not known", f"use {', '.join(f'{one}=' for one in readers)}"))
        values[key] = readers[key](text)
    task = Task(**values)
    if unknown := [op for op in task.ops if op not in OPS]:
        raise BadInput(Problem("ops", f"ops={unknown[0]} is not an operation", f"use {', '.join(OPS)}"))
    return task


def _whole(text: str, most: int) -> int:
    if re.fullmatch(r"[1-9][0-9]{0,11}", text) and int(text) <= most:
        return int(text)
    message = f"{text or 'an empty value'} is not a whole number from 1 to {most:,}"
    raise BadInput(Problem("number", message, "use sizes=4096,4194304 budget_s=60, for example"))


def measured(task: Task, world: World, device: torch.device) -> tuple[list[list[object]], list[str]]:
    """([operation, ranks, bytes, microseconds], what was left out). Collective."""
    watch = Stopwatch(device, SideGroup(world), task.budget_s)
    groups = Groups(world.world_size, world.rank)
    sizes, late_s = sorted(task.sizes), task.late_ms / 1e3
    rows = [[op, *row] for op in task.ops for row in message_rows(watch, groups, op, "float32", sizes, late_s)]
    return rows, watch.left_out


def lines(rows: Sequence[Sequence[object]]) -> list[str]:
    found = [f"{'operation':<16}{'ranks':>6}{'bytes':>12}{'us':>14}{'Mbit/s of an edge':>20}"]
    for op, ranks, size, microseconds in rows:
        assert isinstance(ranks, int) and isinstance(size, int) and isinstance(microseconds, float)
        rate = 8 * edge_bytes(str(op), ranks, size) / microseconds
        found.append(f"{op!s:<16}{ranks:>6}{size:>12,}{microseconds:>14,.1f}{rate:>20,.1f}")
    return found


if __name__ == "__main__":
    lasting()
    main(sys.argv[1:])
