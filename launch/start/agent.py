"""torchrun in a process of its own, as the launchers start it: python -m launch.start.agent ORDER argument …

It ends when the process that started it ends. Its exit code is that of the rank that was the cause of a failure.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from dataclasses import dataclass

from launch.start.watch import Watch
from train.command.process.exits import SIGNALS, reported_once
from train.command.process.parent import die_with, share_lock
from train.command.process.streams import lasting
from train.config.world import AGENT, World, quiet_profiler


@dataclass(frozen=True)
class Order:
    """The first argument, as JSON."""

    parent: int  # the id of the process that started this one
    lock: str = ""  # a file on which it has a shared lock until it ends
    timeout_s: float | None = None  # runtime.timeout_s
    restarts_done: int = 0  # by a torchrun that was killed
    count: int | None = None  # the descriptor of a pipe to which a byte is written for each restart
    logs: str = ""  # a folder with the output of each rank

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def main(order: Order, line: list[str]) -> int:
    """Run torchrun with the arguments `line`, and return the exit code."""
    for number in SIGNALS:  # until torchrun has its own handlers
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by `start_agent`
    with reported_once(World.single()):
        die_with(order.parent)
        if order.lock:
            share_lock(order.lock)  # the ranks do not inherit it; they lock the file themselves
        os.environ[AGENT] = str(os.getpid())
        quiet_profiler()
        from train.ranks.agent import run_torchrun

        watch = Watch(order.timeout_s, order.count)
        watch.start()
        ended_by = run_torchrun(line, watch, order.restarts_done, order.logs)
    for number in SIGNALS:  # all has ended: torchrun's handlers would only print a traceback
        signal.signal(number, signal.SIG_IGN)
    return watch.exit_code(ended_by)


if __name__ == "__main__":
    lasting()
    sys.exit(main(Order(**json.loads(sys.argv[1])), sys.argv[2:]))
