"""Ranks end when the torchrun that started them ends, and torchrun ends with its sweep, even after `kill -9`.

Otherwise the ranks would continue to train without their torchrun, and would disturb the measurements of the next run.
On Linux the kernel ends them. On other systems they are not ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World

PR_SET_PDEATHSIG = 1  # an option of prctl(2)


def bind_to_parents(world: World) -> None:
    """Make this rank end when its torchrun ends, and share the lock of the sweep that it belongs to, if there is
    one."""
    if world.agent is not None:
        die_with(world.agent)
    if world.lock:
        share_lock(world.lock)


def die_with(parent: int) -> None:
    """From now on this process is killed when `parent`, the process that started it, ends. It exits at once if `parent`
    has ended already.

    The signal is KILL, as a rank that waits in a collective does not react to other signals. The kernel watches the
    thread that started this process, so torchrun and its ranks must be started from main threads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call of prctl
        print(
            f"process {parent}, which started this one, has ended, so this process ends too",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(EXIT_ENVIRONMENT)


def share_lock(lock: str) -> int:
    """Take a shared lock on the file until this process ends. A sweep measures nothing while a process has this lock.

    Returns the open file descriptor. Raises BadInput (exit code 3) if another process has an exclusive lock.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        problem = Problem(
            "lock", f"{lock} is locked by another process", "wait until it ends", exit_code=EXIT_ENVIRONMENT
        )
        raise BadInput(problem) from error
    except OSError:  # the file system does not support locks
        pass
    return descriptor
