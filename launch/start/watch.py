"""Watches the ranks of one torchrun: kills those that can no longer end by themselves, and says how the ranks ended.

torchrun's agent only sees ranks that have ended. A rank that is stopped (SIGSTOP) makes the others wait until their
collective times out, and then does not react when the agent asks it to end, for 30 s.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping
from subprocess import Popen
from typing import Protocol

from launch.start.endings import Ending, cause, say
from train.command.process.stopped import PAUSE_S, is_stopped
from train.config.problems import EXIT_PEER

POLL_S = 0.5
# After a rank has crashed, the others cannot save any more, and end within a second. Those that still wait, for example
# for a GPU, are killed after this time; torchrun would wait for 30 s.
ENDING_S = 10.0
SAME_TIME_S = 1  # torch rounds the time at which it saw a failure to seconds


class Failure(Protocol):
    """What torch knows of a rank that has failed (`ProcessFailure`)."""

    exitcode: int
    timestamp: int


class Watch:
    """`timeout_s`: a rank that has been stopped for longer is killed, if there are others; None: only when another rank
    has failed. `count`: the descriptor of a pipe that gets a byte for each restart."""

    def __init__(self, timeout_s: float | None = None, count: int | None = None) -> None:
        self.timeout_s, self.count = timeout_s, count
        self.ending: Ending | None = None  # the cause of the failure, if these ranks have failed
        self._ranks: Mapping[int, Popen[bytes]] = {}
        self._stopped: dict[int, float] = {}  # since when, by rank
        self._killed: dict[int, Ending] = {}
        self._crashed: float | None = None
        self._looked = time.monotonic()

    def start(self) -> None:
        """Look at the ranks, in a thread that ends with this process."""
        threading.Thread(target=self._look_for_ever, daemon=True).start()

    def started(self, ranks: Mapping[int, Popen[bytes]]) -> None:
        """These processes are the ranks from now on."""
        self._ranks, self._stopped, self._killed = ranks, {}, {}
        self._crashed = self.ending = None

    def failed(self, failures: Mapping[int, Failure], done: int, allowed: int) -> bool:
        """Say which rank failed, unless it has said so itself. Returns whether all ranks shall be started again.

        `failures`: of this start, in the order in which they were seen. `done`, `allowed`: numbers of restarts.
        """
        first = min(failure.timestamp for failure in failures.values())
        early = {rank: one.exitcode for rank, one in failures.items() if one.timestamp <= first + SAME_TIME_S}
        self.ending = ending = cause([*self._endings(early)])
        again = done < allowed and ending.may_be_repeated
        if again:
            say(f"{ending}; all ranks are started again (restart {done + 1} of {allowed})")
            if self.count is not None:
                os.write(self.count, b"+")
        elif not ending.said:
            say(str(ending) + (f" (after {done} restart(s))" if done else ""))
        elif ending.code == EXIT_PEER:
            others = sorted(rank for rank, one in failures.items() if one.exitcode != EXIT_PEER)
            if others:
                say(f"still running until then: rank {', '.join(map(str, others))}")
        return again

    def exit_code(self, number: signal.Signals | None) -> int:
        """The exit code of the run. `number`: the signal that ended it, of which one line tells unless the ranks have
        said more; None if none did."""
        if number is None:
            return 0 if self.ending is None else self.ending.exit_code
        codes = {rank: process.returncode for rank, process in self._ranks.items()}
        if codes and not any(codes.values()):
            return 0
        name = f"signal {number.value} ({number.name})"
        expected = (0, None, -number, 128 + number, EXIT_PEER)
        others = [*self._endings({rank: code for rank, code in codes.items() if code not in expected})]
        if not others:
            say(f"the run was ended by {name}")
            return 128 + number
        ending = cause(others)
        if ending.code == -signal.SIGKILL:
            say(f"rank {ending.rank} did not end in time after {name}, and was killed")
        elif not ending.said:
            say(f"{ending}, after the run got {name}")
        return ending.exit_code

    def look(self, now: float) -> None:
        """Kill the ranks that cannot end by themselves. `now`: in seconds, from any start."""
        if now - self._looked > PAUSE_S:
            self._stopped, self._crashed = {}, None
        self._looked = now
        codes = {rank: process.returncode for rank, process in self._ranks.items()}
        alive = {rank: self._ranks[rank] for rank, code in codes.items() if code is None}
        self._stopped = {rank: self._stopped.get(rank, now) for rank, one in alive.items() if is_stopped(one.pid)}
        for rank, since in self._stopped.items():
            late = self.timeout_s is not None and len(codes) > 1 and now - since >= self.timeout_s
            if late or any(codes.values()):
                self._killed[rank] = Ending(rank, -signal.SIGKILL, now - since, self.timeout_s if late else None)
                alive[rank].kill()
        if any(code and Ending(0, code).may_be_repeated for code in codes.values()):
            self._crashed = now if self._crashed is None else self._crashed
            if now - self._crashed > ENDING_S:
                for process in alive.values():
                    process.kill()

    def _look_for_ever(self) -> None:
        while True:
            time.sleep(POLL_S)
            self.look(time.monotonic())

    def _endings(self, codes: Mapping[int, int]) -> Iterable[Ending]:
        for rank, code in codes.items():
            yield self._killed[rank] if code == -signal.SIGKILL and rank in self._killed else Ending(rank, code)
