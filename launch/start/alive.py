"""Locks of a sweep's folder: no second process runs the sweep, and no rank of an earlier start of it is still alive."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, Reported, unusable
from train.config.world import LOCK

RANKS = "ranks.lock"  # a file in the sweep's folder, on which every process of its runs has a shared lock
PATIENCE_S, POLL_S = 10.0, 0.1


class StillAlive(Reported):
    """Processes of an earlier start of this sweep have not ended."""

    exit_code = EXIT_ENVIRONMENT


@contextmanager
def sweep_lock(folder: Path) -> Iterator[None]:
    """Lock the sweep's folder for this process. Raises BadInput (exit code 3) if another process runs this sweep."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(folder.parent, error.strerror) from error
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"{folder} is being run by another process"
            fix = "wait for it, or end it first"
            raise BadInput(Problem("running", message, fix, exit_code=EXIT_ENVIRONMENT)) from error
        except OSError:  # the file system does not support locks
            pass
        yield


def wait_for_ranks(folder: Path, patience_s: float = PATIENCE_S) -> None:
    """Return when no process of an earlier run of this sweep is alive, as it would disturb the measurements of the
    next.

    Raises StillAlive (exit code 3) if some are alive after `patience_s`: killed processes take a moment to end.
    """
    path, deadline = folder / RANKS, time.monotonic() + patience_s
    with path.open("a") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise StillAlive(_still_alive(path)) from error
            except OSError:  # the file system does not support locks
                return
            time.sleep(POLL_S)


def with_variable(name: str, value: str) -> list[psutil.Process]:
    """The processes that were started with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(name) == value:
                found.append(process)
    return found


def _still_alive(path: Path) -> str:
    # every process that shares the lock knows it by this variable
    found = " ".join(str(process.pid) for process in with_variable(LOCK, str(path.resolve())))
    who = f"processes {found}" if found else "processes, perhaps on another machine,"
    fix = f"end them (kill -9 {found})" if found else "end them"
    why = "of an earlier start of this sweep are still running, and would disturb the measurements"
    return f"{who} {why}: {fix}, then run the same command again"
