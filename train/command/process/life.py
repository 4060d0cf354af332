"""A run's mark of life: which process trains in a run's directory, and how far it has come. Torch is not imported.

Rank 0 holds a lock in the directory as long as it lives, so that no second process trains there, and writes `life.json`
at most once a second. Together they tell a running run from one that was cut off. The lock is on a file that is open
for writing, as NFS shares only such locks between machines.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

LIFE, LOCK = "life.json", ".lock"
MOST_BYTES = 16_384  # of life.json
EVERY_S = 1.0
FRESH_S = 60.0  # where locks do not work, a run is taken for a living one so long after it was last seen
TRIES, POLL_S = 20, 0.05
RUNNING, FINISHED, SAVED, STOPPED = "running", "finished", "saved", "stopped"


@dataclass(frozen=True)
class Life:
    """The content of life.json. `state`: running; finished; saved, after a signal; or stopped by the error `reason`.
    `step`: the last complete step. `time`: in seconds since 1970. `launch`: see `World.launch`."""

    state: str
    step: int
    pid: int
    host: str
    time: float
    reason: str = ""
    launch: str = ""


def read_life(run: Path) -> Life | None:
    """What the run's process last wrote; None if there is no such file or it cannot be read. Never blocks."""
    try:
        handle = os.open(run / LIFE, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with open(handle, "rb") as file:
            life = Life(**json.loads(file.read(MOST_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts, numbers = (life.state, life.host, life.reason, life.launch), (life.step, life.pid, life.time)
    good = all(isinstance(one, str) for one in texts) and all(isinstance(one, int | float) for one in numbers)
    return life if good else None


def is_alive(run: Path) -> bool:
    """Whether a process trains in this directory: whether it holds the lock."""
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared, so that several may look
    except BlockingIOError:
        return True
    except OSError:  # the file system does not support locks
        life = read_life(run)
        return life is not None and life.state == RUNNING and time.time() - life.time < FRESH_S
    finally:
        os.close(descriptor)
    return False


def _locked(folder: Path, *, wait: bool) -> tuple[int, bool]:
    """(The open lock file of the folder, whether it is locked: not if the file system does not support locks.) Raises
    BlockingIOError if another process has the lock and this one does not `wait`, and other OSErrors."""
    path, how = folder / LOCK, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            return descriptor, False
        with suppress(FileNotFoundError):  # the process that had the lock may have removed the file
            if path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor, True
        os.close(descriptor)


def _unlock(folder: Path, descriptor: int) -> None:
    """Remove the lock file, which is locked, and give the lock back."""
    with suppress(OSError):
        (folder / LOCK).unlink()
    os.close(descriptor)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a lock on the folder, for which it waits. Without one, where the file system does not support locks, nothing
    is held. Raises OSError."""
    descriptor, _ = _locked(folder, wait=True)
    try:
        yield
    finally:
        _unlock(folder, descriptor)


def refuse_living(run: Path) -> None:
    """Raise BadInput (exit code 3) if a process trains in this directory."""
    if is_alive(run):
        raise _is_trained(run)


def _is_trained(run: Path) -> BadInput:
    life = read_life(run)
    who = "another process" if life is None else f"process {life.pid} on {life.host}"
    fix = "wait for it, end it, or use checkpoint.resume=never to start a second run of the same config"
    return BadInput(Problem("running", f"{run} is being trained by {who}", fix, exit_code=EXIT_ENVIRONMENT))


class Living:
    """This process's lock on a run's directory, until `end` or until the process ends. Raises BadInput as
    `refuse_living` does."""

    def __init__(self, run: Path, step: int, launch: str = "") -> None:
        """`step`: the last one that is done. `launch`: see `World.launch`. Raises OSError too."""
        self.run, self.step, self.launch, self.written = run, step, launch, 0.0
        for patience in reversed(range(TRIES)):
            try:
                descriptor, locked = _locked(run, wait=False)
                break
            except BlockingIOError:
                if not patience:
                    raise _is_trained(run) from None
                time.sleep(POLL_S)  # somebody may only be looking (`is_alive`)
        if not locked:
            last = read_life(run)
            if not launch or last is None or last.launch != launch:  # else an earlier start of these ranks wrote it
                refuse_living(run)
        self.descriptor: int | None = descriptor
        self._write(RUNNING)

    def at(self, step: int) -> None:
        """Say that this step is complete."""
        self.step = step
        if time.monotonic() > self.written + EVERY_S:
            self._write(RUNNING)

    def end(self, state: str, reason: str = "") -> None:
        """Say how the run ended, and give the lock back."""
        with suppress(OSError):  # the disk may be full, which is then the reason
            self._write(state, reason)
        self.close()

    def close(self) -> None:
        """Give the lock back, if this is not done yet. What life.json says stays: a run that is not said to have ended
        was cut off."""
        if self.descriptor is not None:
            _unlock(self.run, self.descriptor)
            self.descriptor = None

    def _write(self, state: str, reason: str = "") -> None:
        self.written = time.monotonic()
        life = Life(state, self.step, os.getpid(), socket.gethostname(), time.time(), reason, self.launch)
        values: dict[str, Any] = asdict(life)
        new = self.run / f".{LIFE}.{os.getpid()}.tmp"
        new.write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(new, self.run / LIFE)
