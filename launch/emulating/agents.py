"""torchrun's agents of one run, one on each host, watched until all have ended; and faults that happen meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launch.emulating.cluster import NIC, STORE_PORT, Cluster, cut
from launch.emulating.namespaces import Network
from launch.emulating.record import MARK
from launch.start.agent import Order
from launch.start.environment import SHORT_LOOKUP, local_environment
from launch.start.nodes import Node, nodes_line
from launch.start.torchrun import end_at_once, start_agent
from train.command.launching.network import Fault
from train.config.world import LAUNCH, RUN_FILE

POLL_S = 0.1
LATE_S = 45.0  # after one agent has failed: torchrun gives its ranks 30 s to end


@dataclass(frozen=True)
class Agent:
    """An agent on a host, with `ranks` processes."""

    node: int
    ranks: int


@dataclass(frozen=True)
class Job:
    """One run. `hosts`: of each rank. `timeout_s`: runtime.timeout_s."""

    overrides: tuple[str, ...]
    hosts: tuple[int, ...]
    program: str = "train/main.py"
    timeout_s: float = 300.0
    join_s: int = 60
    fault: Fault | None = None

    @property
    def agents(self) -> list[Agent]:
        """One for each host if its ranks follow each other, as torchrun numbers them; else one for each rank."""
        if [*self.hosts] == sorted(self.hosts):
            return [Agent(node, self.hosts.count(node)) for node in dict.fromkeys(self.hosts)]
        return [Agent(node, 1) for node in self.hosts]


@dataclass
class Outcome:
    """`codes`: the exit code of each agent's ranks. `first`: the number of the agent that failed first. `sent`: for
    each host, the bytes that its link carried away from it and to it."""

    codes: list[int] = field(default_factory=list)
    first: int | None = None
    sent: dict[int, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        return 0 if self.first is None else self.codes[self.first]


def nodes_of(job: Job, cluster: Cluster) -> list[Node]:
    """What each agent is told of the others."""
    agents = job.agents
    head = cluster.address(agents[0].node)
    return [
        Node(number, len(agents), head, STORE_PORT, cluster.address(agent.node), job.join_s, NIC)
        for number, agent in enumerate(agents)
    ]


def lines_of(job: Job, cluster: Cluster) -> list[tuple[Agent, list[str]]]:
    """torchrun's arguments for each agent."""
    return [
        (agent, nodes_line(job.overrides, agent.ranks, node, program=job.program))
        for agent, node in zip(job.agents, nodes_of(job, cluster), strict=True)
    ]


def environment(node: Node, nproc: int, mark: str) -> dict[str, str]:
    """The environment of an agent: no name server is waited for, as a host reaches none. The processes of all hosts,
    `nproc` in number, share the cores of this machine."""
    env, _ = local_environment(nproc, {**SHORT_LOOKUP, **os.environ}, node)
    return env | {"GLOO_SOCKET_IFNAME": node.interface, MARK: mark}


def run(job: Job, net: Network, mark: str, logs: Path, run_file: Path) -> Outcome:
    """Run it on the hosts of an emulated cluster, with a log for each agent. Call it from the main thread.

    All its processes have ended afterwards, also after an exception, which ctrl-C raises.
    """
    cluster, outcome, began = net.cluster, Outcome(), time.monotonic()
    nodes = nodes_of(job, cluster)
    # what tells ranks that they are of one start must be the same on all hosts
    shared = {RUN_FILE: str(run_file.resolve()), LAUNCH: uuid.uuid4().hex}
    before = net.sent()
    with ExitStack() as opened:
        watched = _Watched(job, net, run_file)
        opened.callback(watched.end)
        for number, (agent, line) in enumerate(lines_of(job, cluster)):
            log = opened.enter_context((logs / f"{number}.log").open("w"))
            watched.start(agent, line, environment(nodes[number], cluster.nproc, mark) | shared, log)
        outcome.codes, outcome.first = watched.wait()
    after = net.sent()
    outcome.sent = {node: (after[node][0] - sent, after[node][1] - got) for node, (sent, got) in before.items()}
    outcome.seconds = time.monotonic() - began
    return outcome


class _Watched:
    """The agents of a run while it is going on."""

    def __init__(self, job: Job, net: Network, run_file: Path) -> None:
        self.job, self.net, self.run_file = job, net, run_file
        self.agents: list[tuple[Agent, subprocess.Popen[bytes]]] = []
        self._up_at: float | None = None
        self._happened = False
        self._began = time.monotonic()

    def start(self, agent: Agent, line: Sequence[str], env: Mapping[str, str], log: IO[str]) -> None:
        prefix, fault = self.net.enter(agent.node), self.job.fault
        if fault and fault.kind == "late" and fault.node == agent.node:
            prefix = ["sh", "-c", f'sleep {fault.seconds:g} && exec "$@"', "late", *prefix]
        order = Order(os.getpid(), timeout_s=self.job.timeout_s)
        self.agents.append((agent, start_agent(order, line, env, output=log, prefix=prefix)))

    def wait(self) -> tuple[list[int], int | None]:
        """Wait for all: (their exit codes, the first that failed). Some time after a failure the others are ended."""
        first, deadline = None, float("inf")
        while True:
            self._fault()
            codes = [process.poll() for _, process in self.agents]
            if first is None and (failed := [i for i, code in enumerate(codes) if code]):
                first, now = failed[0], time.monotonic()
                # a host that has not started yet has nobody left to join
                deadline = now if self._is_late(now) else now + self.job.timeout_s + LATE_S
            if None not in codes:
                return [code if code >= 0 else 128 - code for code in codes if code is not None], first
            if time.monotonic() > deadline:
                self.end()
            time.sleep(POLL_S)

    def _is_late(self, now: float) -> bool:
        fault = self.job.fault
        return fault is not None and fault.kind == "late" and now < self._began + (fault.seconds or 0.0)

    def end(self) -> None:
        """Ask those that are left to end, then end them."""
        left = [process for _, process in self.agents if process.poll() is None]
        for process in left:
            process.terminate()
        deadline = time.monotonic() + 5.0
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
            end_at_once(process)

    def _fault(self) -> None:
        """Let the fault happen when its step has been logged, and end it when its time is over."""
        fault = self.job.fault
        if self._up_at is not None and time.monotonic() > self._up_at and fault:
            self.net.do([cut(fault.node, up=True)])
            self._up_at = None
        if self._happened or fault is None or fault.step is None or self._step() < fault.step:
            return
        self._happened = True
        self.net.do([cut(fault.node)])
        if fault.kind == "kill":  # as when a machine loses its power: the others hear nothing of it
            for agent, process in self.agents:
                if agent.node == fault.node:
                    end_at_once(process)
        elif fault.seconds is not None:
            self._up_at = time.monotonic() + fault.seconds

    def _step(self) -> int:
        """The last step that the run has logged; 0 before the first."""
        with contextlib.suppress(OSError):
            path = Path(self.run_file.read_text().strip()) / "metrics.jsonl"
            return path.read_bytes().count(b'"train/loss"')
        return 0
