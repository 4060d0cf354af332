"""A run's mark of life: which process trains in a run's directory, and how far it has come. Torch is not imported.

Rank 0 holds a lock on the directory as long as it lives, so that no second process trains there, and writes `life.json`
at most once a second. Together they tell a running run from one that was cut off.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

LIFE = "life.json"
EVERY_S = 1.0
TRIES, POLL_S = 20, 0.05
RUNNING, FINISHED, SAVED, STOPPED = "running", "finished", "saved", "stopped"


@dataclass(frozen=True)
class Life:
    """The content of life.json. `state`: running; finished; saved, after a signal; or stopped by the error `reason`.
    `step`: the last complete step. `time`: in seconds since 1970."""

    state: str
    step: int
    pid: int
    host: str
    time: float
    reason: str = ""


def read_life(run: Path) -> Life | None:
    """What the run's process last wrote; None if there is no such file or it is not readable."""
    try:
        values = json.loads((run / LIFE).read_text(encoding="utf-8"))
        return Life(**values)
    except (OSError, ValueError, TypeError):
        return None


def is_alive(run: Path) -> bool:
    """Whether a process trains in this directory: whether it holds the lock."""
    try:
        descriptor = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system does not support locks
        pass
    finally:
        os.close(descriptor)
    return False


def refuse_living(run: Path) -> None:
    """Raise BadInput (exit code 3) if a process trains in this directory."""
    if not is_alive(run):
        return
    life = read_life(run)
    who = "another process" if life is None else f"process {life.pid} on {life.host}"
    fix = "wait for it, end it, or use checkpoint.resume=never to start a second run of the same config"
    raise BadInput(Problem("running", f"{run} is being trained by {who}", fix, exit_code=EXIT_ENVIRONMENT))


class Living:
    """This process's lock on a run's directory, until `end` or until the process ends. Raises BadInput as
    `refuse_living` does."""

    def __init__(self, run: Path, step: int) -> None:
        self.run, self.step, self.written = run, step, 0.0
        self.descriptor: int | None = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
        for patience in reversed(range(TRIES)):
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if patience:  # somebody may only be looking (`is_alive`)
                    time.sleep(POLL_S)
                    continue
                self.close()
                refuse_living(run)
            except OSError:  # the file system does not support locks
                break
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
            os.close(self.descriptor)
            self.descriptor = None

    def _write(self, state: str, reason: str = "") -> None:
        self.written = time.monotonic()
        life = Life(state, self.step, os.getpid(), socket.gethostname(), time.time(), reason)
        values: dict[str, Any] = asdict(life)
        new = self.run / f".{LIFE}.{os.getpid()}.tmp"
        new.write_text(json.dumps(values) + "\n", encoding="utf-8")
        os.replace(new, self.run / LIFE)
