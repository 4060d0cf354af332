"""A process that examines what may hang or crash: a disk that does not answer, a name that is looked up, torch.

It prints what it finds as lines of JSON. So what it found before it hung or crashed is known, and the doctor itself
neither hangs nor crashes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from launch.start.environment import source_path
from train.command.process.parent import die_with

END_S = 0.2  # for a killed process to end; one that waits for a disk does not end
LEAST_S = 0.2  # in which the answers are read of a process that has long ended when its turn comes
LONGEST = 300  # characters of its last line
MORE_TIME = "python -m launch.doctor limit_s=60 gives it more time"


@dataclass(frozen=True)
class Answers:
    """`found`: what the process printed, by name. `end`: how it ended, if not by itself with code 0. `late`: it was
    given up after so many `seconds`."""

    found: dict[str, Any] = field(default_factory=dict)
    end: str = ""
    late: bool = False
    seconds: float = 0.0


class Child:
    """A Python process that runs `module`, whose `main` calls `begin`, with the environment `env`. It starts at once,
    and is killed at the end of its context."""

    def __init__(self, module: str, asked: Any, env: Mapping[str, str]) -> None:
        self.started = time.monotonic()
        # -P: a module in the working directory, for example somebody's train.py, must not replace one of this program
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(os.getpid()), json.dumps(asked)],
            env={**env, **source_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.returncode is None:
            self.kill()

    def answers(self, deadline: float) -> Answers:
        """Wait until the process ends. At `deadline`, a time of `time.monotonic`, it is killed, together with the
        processes that it started."""
        try:
            out, err = self.process.communicate(timeout=max(deadline - time.monotonic(), LEAST_S))
        except subprocess.TimeoutExpired as late:
            self.kill()
            seconds = time.monotonic() - self.started
            end = f"it did not answer within {seconds:.0f} s"
            return Answers(_found(late.stdout or b""), end, late=True, seconds=seconds)
        code = self.process.returncode
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        lines = err.decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:LONGEST]}" if lines else ""
        return Answers(_found(out), f"it ended with {how}{last}" if code else "")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)


def begin() -> Any:
    """Called by the process itself, first: it ends when the doctor ends. Returns what it was asked."""
    die_with(int(sys.argv[1]))
    return json.loads(sys.argv[2])


def say(**values: Any) -> None:
    """Print a line, which is one write, as several processes share the output."""
    os.write(1, f"{json.dumps(values)}\n".encode())


def _found(output: bytes) -> dict[str, Any]:
    """The values of all whole lines of JSON; other programs' lines are left out."""
    found: dict[str, Any] = {}
    for line in output.decode(errors="replace").splitlines():
        with suppress(ValueError):
            values = json.loads(line)
            found |= values if isinstance(values, dict) else {}
    return found
