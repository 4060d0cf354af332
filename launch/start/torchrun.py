"""Start torchrun as a child process. A point of a sweep has its output in a file, and is ended with all its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from launch.start.agent import Order
from launch.start.alive import RANKS, with_variable
from launch.start.environment import local_environment, source_path, torchrun_line
from launch.start.progress import Progress
from train.command.process.exits import SIGNALS
from train.config.world import AGENT, LOCK, RUN_FILE

PATIENCE_S = 35.0  # torchrun gives its ranks 30 s between TERM and KILL
POLL_S = 1.0  # the interval between updates of the progress
GONE_S = 10.0  # a killed process takes a moment to end
NUM_LINES, WIDTH = 8, 200  # how much of a log is shown

# (overrides, nproc, log, the file in which rank 0 writes its run's directory) -> exit code
Start = Callable[[Sequence[str], int, Path, Path], int]


def start_agent(
    order: Order,
    line: Sequence[str],
    env: Mapping[str, str],
    *,
    output: IO[str] | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start torchrun with the arguments `line`, in a process that ends with this one. Call it from the main thread.

    It is in a session of its own, so that ctrl-C in a terminal reaches only this process, which then tells torchrun.
    Signals that arrive meanwhile are delivered when the new process can handle them. `output`: a file; None for this
    process's own streams. `prefix`: a command that becomes torchrun, such as one that enters another namespace.
    """
    # -P: a module in the working directory, for example somebody's train.py, must not replace one of this program
    command = [*prefix, sys.executable, "-P", "-m", "launch.start.agent", str(order), *line]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the new process inherits it
    try:
        return subprocess.Popen(
            command,
            env={**env, **source_path()},
            stdin=None if output is None else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=() if order.count is None else (order.count,),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once(agent: subprocess.Popen[bytes]) -> None:
    """Kill torchrun and whatever it has started, and return when all have ended. It may have ended before its ranks."""
    agent.kill()
    agent.wait()
    processes = with_variable(AGENT, str(agent.pid))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=GONE_S)


def torchrun(overrides: Sequence[str], nproc: int, log: Path, run_file: Path) -> int:
    """Run torchrun and return its exit code. Ctrl-C, TERM or KILL of this process ends the ranks too. Call it from the
    main thread."""
    lock = str((run_file.parent / RANKS).resolve())
    env, _ = local_environment(nproc, os.environ)
    env |= {RUN_FILE: str(run_file.resolve()), LOCK: lock}
    progress = Progress(run_file, log)
    with log.open("w") as output:
        order = Order(parent=os.getpid(), lock=lock)
        process = start_agent(order, torchrun_line(overrides, nproc), env, output=output)
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_S)
                progress.show()
        finally:
            progress.clear()
            if process.poll() is None:
                _end(process)


def last_words(log: Path) -> list[str]:
    """The last lines of a failed run's log."""
    text = log.read_text(errors="replace").rstrip() or "(no output)"
    lines = [line for line in text.splitlines() if line.strip()]
    return [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines[-NUM_LINES:]]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send TERM, which torchrun passes to its ranks. After PATIENCE_S or a second ctrl-C, kill what is left."""
    try:
        process.terminate()
        process.wait(PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        end_at_once(process)
