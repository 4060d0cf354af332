"""Ranks end with the torchrun that started them, and torchrun with its sweep, whatever ended these: `kill -9` too.

Ranks of a torchrun that is gone would train on, and be measured beside the next run. On Linux the kernel ends them; on
another system nothing is tied.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World

PR_SET_PDEATHSIG = 1  # of prctl(2)


def tie(world: World) -> None:
    """Let this rank end with its torchrun, and share the lock of the sweep that it trains for, if there is one."""
    if world.agent is not None:
        die_with(world.agent)
    if world.lock:
        hold(world.lock)


def die_with(parent: int) -> None:
    """From here on this process is killed when `parent`, the process that started it, ends; now, if it has ended.

    By KILL, as a rank that waits in a collective hears of no other signal. The kernel watches the thread that started
    this process, so torchrun and its ranks are started from main threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        print(f"process {parent}, which started this one, has ended, and so does this one", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_ENVIRONMENT)


def hold(lock: str) -> int:
    """Share the lock file until this process ends. A sweep measures nothing while anything holds its lock.

    Returns the open descriptor. Raises BadInput (exit code 3) if a sweep has it for itself.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        problem = Problem("lock", f"{lock} is held by another process", "wait for it", exit_code=EXIT_ENVIRONMENT)
        raise BadInput(problem) from error
    except OSError:  # the file system knows no locks
        pass
    return descriptor
