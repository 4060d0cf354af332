"""The keeper of a rank: a small process without torch that starts the rank, outlives it, and starts it again.

torchrun ends all of its processes as soon as one of them ends. With `runtime.elastic` these processes are keepers, so
it does not notice that a rank was killed. A rank that ends by itself, with any exit code, ends its keeper with this
code, as an error that the program raises would come again. Only a rank that was started again is given more tries,
because the others do well without it. The keeper of rank 0 also keeps the roll.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from types import FrameType
from typing import NoReturn

from train.command.process.exits import SIGNALS
from train.command.process.stopped import PAUSE_S, is_stopped
from train.config.problems import EXIT_ENVIRONMENT, EXIT_SAVED, BadInput, Problem
from train.config.world import World, kept_environment
from train.ranks.elastic.roll import Roll
from train.ranks.elastic.server import RollServer

POLL_S = 0.2
STOPPED_S = 10.0  # a rank that is stopped (SIGSTOP) for so long is killed, as the others wait for it
SETTLED_S = 60.0  # a rank that ran for so long was started successfully
MOST_STARTS = 6  # one after the other without success; the wait before each doubles, from 1 s


class Keeper:
    """Keeps the rank of the world. Call `run` from the main thread, because the rank ends with the thread that starts
    it. `timeout_s`: runtime.timeout_s. `unit`: how many ranks hold the whole state together."""

    def __init__(self, world: World, timeout_s: float, unit: int) -> None:
        self.world, self.patience_s, self.unit = world, min(STOPPED_S, timeout_s), unit
        self.child: subprocess.Popen[bytes] | None = None
        self.signalled = False  # somebody asked this process to end

    def run(self) -> int:
        """Run the rank until it ends by itself or is asked to. Returns the exit code for this process. Raises BadInput
        (exit code 3) without torchrun, and where a rank would outlive its keeper."""
        if self.world.store is None or self.world.agent is None:
            _refuse("runtime.elastic=true needs torchrun", "start it by torchrun or python -m launch.local")
        if sys.platform != "linux":
            _refuse("runtime.elastic=true needs Linux", "use runtime.elastic=false")
        server = None
        if self.world.rank == 0:
            server = RollServer(Roll(self.world.world_size, self.unit), _own_address(*self.world.store))
        environment = kept_environment(self.world, "" if server is None else server.address)
        for number in SIGNALS:
            signal.signal(number, self._forward)
        code = self._keep(environment)
        if server is not None and code == 0:
            server.wait_until_empty()
        return code if code >= 0 else 128 - code  # as a shell says it

    def _keep(self, environment: dict[str, str]) -> int:
        """Start the rank, again and again. Returns how it ended at last, as `Popen.returncode`."""
        starts, first = 0, True
        while True:
            started = time.monotonic()
            self.child = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], env=environment, start_new_session=True
            )  # in a session of its own, as torchrun signals this process's, and each signal must arrive once
            code = self._wait(self.child)
            starts = 1 if time.monotonic() > started + SETTLED_S else starts + 1
            decided = code in (0, EXIT_SAVED) or code - 128 in SIGNALS or (code > 0 and first)
            if decided or self.signalled:
                return code
            first = False
            how = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
            if starts >= MOST_STARTS:
                self._say(f"{how}, as {starts} times one after the other, and is not started again")
                return code
            self._say(f"{how} and is started again")
            time.sleep(2 ** (starts - 2) if starts > 1 else 0)

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        stopped_since: float | None = None
        looked = time.monotonic()
        while True:
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                stopped = is_stopped(child.pid) and now - looked <= PAUSE_S
                stopped_since, looked = (stopped_since or now) if stopped else None, now
                if stopped_since is not None and now > stopped_since + self.patience_s:
                    self._say(f"has been stopped (SIGSTOP) for {self.patience_s:.0f} s and is killed")
                    child.kill()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self.child is None or self.child.poll() is not None:
            raise SystemExit(128 + number)
        self.child.send_signal(number)

    def _say(self, what: str) -> None:
        pid = "" if self.child is None else f" (process {self.child.pid})"
        print(f"rank {self.world.rank}{pid} {what}", file=sys.stderr, flush=True)


def _refuse(message: str, fix: str) -> NoReturn:
    raise BadInput(Problem("elastic", message, fix, exit_code=EXIT_ENVIRONMENT))


def _own_address(host: str, port: int) -> str:
    """The address of this machine under which the machine with torchrun's store can reach it. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
