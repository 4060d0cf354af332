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

import psutil

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World, kept_environment
from train.ranks.elastic.roll import Roll
from train.ranks.elastic.server import RollServer

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
POLL_S = 0.2
STOPPED_S = 10.0  # a rank that is stopped (SIGSTOP) for so long is killed, as the others wait for it
SETTLED_S = 60.0  # a rank that ran for so long was started successfully
MOST_STARTS = 6  # one after the other without success; the wait before each doubles, from 1 s


class Keeper:
    """Keeps the rank of the world. Call `run` from the main thread, because the rank ends with the thread that starts
    it."""

    def __init__(self, world: World) -> None:
        self.world, self.rank = world, f"rank {world.rank}"
        self.child: subprocess.Popen[bytes] | None = None
        self.signalled = False  # somebody asked this process to end

    def run(self) -> int:
        """Run the rank until it ends by itself or is asked to. Returns the exit code for this process. Raises BadInput
        (exit code 3) without torchrun."""
        if self.world.store is None or self.world.agent is None:
            message, fix = "runtime.elastic=true needs torchrun", "start it by torchrun or python -m launch.local"
            raise BadInput(Problem("elastic", message, fix, exit_code=EXIT_ENVIRONMENT))
        server = None
        if self.world.rank == 0:
            server = RollServer(Roll(self.world.world_size), _own_address(*self.world.store))
        environment = kept_environment("" if server is None else server.address)
        for number in FORWARDED:
            signal.signal(number, self._forward)
        starts, first = 0, True
        while True:
            started = time.monotonic()
            self.child = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]], env=environment, start_new_session=True
            )  # in a session of its own, as torchrun signals this process's, and each signal must arrive once
            code = self._wait(self.child)
            starts = 1 if time.monotonic() > started + SETTLED_S else starts + 1
            if code == 0 or (code > 0 and first) or self.signalled or starts >= MOST_STARTS:
                break
            first = False
            how = f"exited with code {code}" if code > 0 else f"was ended by {signal.Signals(-code).name}"
            self._say(f"{how} and is started again")
            time.sleep(2 ** (starts - 1) if starts > 1 else 0)
        if server is not None and code == 0:
            server.wait_until_empty()
        return code if code >= 0 else 128 - code  # as a shell says it

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        stopped_since: float | None = None
        while True:
            try:
                return child.wait(POLL_S)
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                stopped_since = (stopped_since or now) if _is_stopped(child.pid) else None
                if stopped_since is not None and now > stopped_since + STOPPED_S:
                    self._say(f"has been stopped for {STOPPED_S:.0f} s and is killed")
                    child.kill()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.signalled = True
        if self.child is not None and self.child.poll() is None:
            self.child.send_signal(number)

    def _say(self, what: str) -> None:
        pid = "" if self.child is None else f" (process {self.child.pid})"
        print(f"{self.rank}{pid} {what}", file=sys.stderr, flush=True)


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _own_address(host: str, port: int) -> str:
    """The address of this machine under which the machine with torchrun's store can reach it. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
