"""Network namespaces of this user, held by processes: they need no name, no mount and no rights beyond a user
namespace.

A namespace lives as long as a process in it. Here this is `cat`, which reads from a pipe of this process, so it ends
when this process ends, however that happens. Root makes network namespaces only; everybody else first makes a user
namespace, in which they are root.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from launch.emulating.cluster import SWITCH, Cluster
from launch.emulating.record import MARK, Record
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

TOOLS = {"ip": "iproute2", "tc": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
LIMIT_S = 30.0  # of a command
Steps = Sequence[tuple[int, Sequence[str]]]  # (namespace, commands)
ALLOW = (
    "run it as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, on Ubuntu also "
    "kernel.apparmor_restrict_unprivileged_userns=0; a container needs --cap-add=NET_ADMIN --cap-add=SYS_ADMIN)"
)


def surroundings() -> dict[str, str]:
    """The environment for the tools, which a user's PATH may lack."""
    return os.environ | {"PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])}


def refuse(rule: str, message: str, fix: str) -> BadInput:
    return BadInput(Problem(rule, message, fix, exit_code=EXIT_ENVIRONMENT))


@dataclass(frozen=True)
class Rights:
    """How this user may make network namespaces."""

    rootless: bool

    @property
    def unshare(self) -> list[str]:
        """The command that makes the first namespace."""
        return ["unshare", *(["--user", "--map-root-user"] if self.rootless else []), "--net"]

    def enter(self, pid: int | str) -> list[str]:
        """The command that starts another one in the namespaces of a process."""
        user = ["--user", "--preserve-credentials"] if self.rootless else []
        return ["nsenter", f"--target={pid}", *user, "--net"]


def rights(limit_s: float = LIMIT_S) -> Rights:
    """Raises BadInput (exit code 3) if a tool is missing or neither way is allowed."""
    env = surroundings()
    if missing := [name for name in TOOLS if shutil.which(name, path=env["PATH"]) is None]:
        package = TOOLS[missing[0]]
        raise refuse("netlab_tools", f"{missing[0]} is not installed", f"install {package} (apt install {package})")
    said = ""
    for found in (Rights(rootless=False), Rights(rootless=True)):
        # the shaper is tried too: a namespace of a kernel without it is of no use
        script = "ip link set lo up && tc qdisc add dev lo root tbf rate 1gbit burst 100kb limit 1mb"
        done = _shell(found.unshare, script, limit_s)
        if done.returncode == 0:
            return found
        said = " ".join(done.stderr.split())
    if "qdisc" in said:
        fix = "use a kernel with CONFIG_NET_SCH_TBF (modprobe sch_tbf)"
        raise refuse("netlab_tbf", f"this kernel cannot shape links ({said})", fix)
    raise refuse("netlab_rights", f"this user may not make network namespaces ({said})", ALLOW)


def has_netem(found: Rights, limit_s: float = LIMIT_S) -> bool:
    """Whether the kernel can delay and lose packets."""
    script = "ip link set lo up && tc qdisc add dev lo root netem delay 1ms"
    return _shell(found.unshare, script, limit_s).returncode == 0


def _shell(enter: Sequence[str], script: str, limit_s: float) -> subprocess.CompletedProcess[str]:
    line = [*enter, "sh", "-c", script]
    return subprocess.run(line, capture_output=True, text=True, timeout=limit_s, env=surroundings())


class Network:
    """An emulated cluster that exists. `pids`: the processes that hold the hosts and, under SWITCH, the bridge."""

    def __init__(self, cluster: Cluster, found: Rights, pids: dict[int, int]) -> None:
        self.cluster, self.rights, self.pids = cluster, found, pids

    def enter(self, node: int) -> list[str]:
        return self.rights.enter(self.pids[node])

    def do(self, steps: Steps) -> None:
        """Run commands in their namespaces. Raises BadInput (exit code 3) if one fails."""
        for node, lines in steps:
            script = "\n".join(["set -e", *(line.format(*self._hosts()) for line in lines)])
            done = _shell(self.enter(node), script, LIMIT_S)
            if done.returncode:
                said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
                raise refuse(
                    "netlab_link", f"the network cannot be set up ({said})", "python -m launch.doctor says more"
                )

    def sent(self) -> dict[int, tuple[int, int]]:
        """For each host, the bytes that it has sent over its link and received from it, headers included."""
        done = _shell(self.enter(SWITCH), "ip -json -statistics link show", LIMIT_S)
        found = {one["ifname"]: one["stats64"] for one in json.loads(done.stdout)}
        return {
            node: (found[f"port{node}"]["rx"]["bytes"], found[f"port{node}"]["tx"]["bytes"])
            for node in range(self.cluster.nodes)
        }

    def _hosts(self) -> list[int]:
        return [self.pids[node] for node in range(self.cluster.nodes)]


@contextmanager
def network(cluster: Cluster, found: Rights, record: Record) -> Iterator[Network]:
    """The hosts and links of a cluster, unshaped. They do not outlive the context, nor this process."""
    with ExitStack() as held:
        env = surroundings() | {MARK: record.mark}
        pids = {SWITCH: held.enter_context(_holder([*found.unshare], env))}
        made = Network(cluster, found, pids)
        for node in range(cluster.nodes):
            pids[node] = held.enter_context(_holder([*made.enter(SWITCH), "unshare", "--net"], env))
        made.do(cluster.makes())
        yield made


@contextmanager
def _holder(line: Sequence[str], env: dict[str, str]) -> Iterator[int]:
    """The id of a process that holds the namespaces that `line` makes."""
    process = subprocess.Popen(
        [*line, "cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, start_new_session=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        # an echo says that it is in its namespaces
        process.stdin.write(b"\n")
        process.stdin.flush()
        if process.stdout.read(1) != b"\n":
            raise refuse("netlab_rights", f"a namespace cannot be made ({' '.join(line)})", ALLOW)
        yield process.pid
    finally:
        process.kill()
        process.stdin.close()
        process.stdout.close()
        process.wait()
