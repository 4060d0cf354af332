"""Run torchrun in this terminal, as a child of this process, which passes signals on to it and takes its exit code."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

from launch.start.agent import Order
from launch.start.endings import how_ended, say
from launch.start.torchrun import end_at_once, start_agent
from train.command.process.exits import SIGNALS

SHOW_CURSOR = "\x1b[?25h"


def run_here(
    line: Sequence[str], env: Mapping[str, str], *, timeout_s: float, restarts: int = 0, logs: str | None = None
) -> int:
    """Run torchrun with the arguments `line`. Returns 0 if all ranks succeeded, else the exit code of the rank that was
    the cause of its end, which is 128 + n after signal n.

    `restarts`: how often it may start its ranks again; if torchrun itself is killed, another one goes on with what is
    left of them. `timeout_s`: how long a rank may be stopped while others wait for it. `logs`: a folder that gets the
    output of each rank.
    """
    forwarder, done = _Forwarder(), 0
    with forwarder.installed():
        while True:
            order = Order(os.getpid(), timeout_s=timeout_s, restarts_done=done, logs=logs or "")
            code, restarted = _run(forwarder, order, line, env)
            done += restarted
            if code >= 0 or forwarder.last is not None:
                break
            said = f"torchrun's process {how_ended(code)}"
            if done >= restarts:
                say(said + (f" (after {done} restart(s))" if done else ""))
                break
            done += 1
            say(f"{said}; it and all ranks are started again (restart {done} of {restarts})")
    if code and sys.stderr.isatty():  # a rank that was killed has left the cursor hidden, as a progress bar hides it
        print(SHOW_CURSOR, end="", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 + (forwarder.last or -code)


def _run(forwarder: _Forwarder, order: Order, line: Sequence[str], env: Mapping[str, str]) -> tuple[int, int]:
    """Run torchrun once. Returns (how it ended, as `Popen.returncode`; how often it has started its ranks again)."""
    read, write = os.pipe()
    with open(read, "rb") as restarts:
        with open(write, "wb"):
            agent = forwarder.start(dataclasses.replace(order, count=write), line, env)
        code = agent.wait()
        if code < 0:  # it could not end its ranks
            end_at_once(agent)
        return code, len(restarts.read())


class _Forwarder:
    """Passes each signal that this process gets on to torchrun, which a second ctrl-C kills. `last`: the latest."""

    def __init__(self) -> None:
        self.last: int | None = None
        self._missed = False  # whether `last` came while no torchrun was running
        self._agent: subprocess.Popen[bytes] | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in SIGNALS}
        # a signal that is ignored, as HUP is under nohup, stays so
        ours = {number: old for number, old in before.items() if old != signal.SIG_IGN}
        for number in ours:
            signal.signal(number, self._forward)
        try:
            yield
        finally:
            for number, old in ours.items():
                signal.signal(number, old)

    def start(self, order: Order, line: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
        self._agent = None
        self._agent = agent = start_agent(order, line, env)
        if self._missed and self.last is not None:
            agent.send_signal(self.last)
        return agent

    def _forward(self, number: int, frame: FrameType | None) -> None:
        again = number == self.last == signal.SIGINT
        self.last = number
        if self._agent is None:
            self._missed = True
        else:
            self._agent.send_signal(signal.SIGKILL if again else number)
