"""The command line and the environment with which launchers start torchrun on this machine, alone or as one of several.

A local run needs no host name: its ranks connect at 127.0.0.1. Of several machines, each uses the address at which the
others reach it. Variables from another launch are left out with a note: `RANK`, `WORLD_SIZE` and the like, and `PET_*`,
which would override torchrun's arguments.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from train.command.process.exits import SIGNALS
from train.command.resources import INSTALLED, ROOT, path_of
from train.config.world import AGENT, LAUNCH, LOCK, NEEDED, PLACE, ROLL, RUN_FILE

LOOPBACK = "lo"  # the name of the interface of 127.0.0.1 on Linux
OWN = (
    AGENT,
    LAUNCH,
    LOCK,
    ROLL,
    RUN_FILE,
)  # the lab's own variables, which may be set if a rank starts a run; users need no note about them
SHORT_LOOKUP = {"RES_OPTIONS": "timeout:1 attempts:1"}  # glibc's resolver otherwise waits 10 s or more for a name
SET_BY_TORCHRUN = {*PLACE, *NEEDED, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"} | {
    f"TORCHELASTIC_{name}" for name in ("RUN_ID", "RESTART_COUNT", "MAX_RESTARTS", "USE_AGENT_STORE", "ERROR_FILE")
}


@dataclass(frozen=True)
class Node:
    """One of several machines whose ranks are one world. `number`: from 0 on; ranks are numbered from machine to
    machine. `head`, `port`: where machine 0 has torchrun's store. `address`, `interface`: at which the others reach
    this machine; empty if torch is to find them. `join_s`: how long torchrun waits for the others."""

    number: int
    count: int
    head: str
    port: int
    address: str = ""
    interface: str = ""
    join_s: int = 60


def threads(nproc: int) -> str:
    """OMP_NUM_THREADS of each process. torchrun would set it to 1 for several processes, and cores would be idle."""
    return str(max((os.cpu_count() or 1) // nproc, 1))


def left_behind(env: Mapping[str, str]) -> list[str]:
    """The names of the variables of another launch, which a local launch leaves out."""
    return sorted(name for name in env if name.startswith("PET_") or name in SET_BY_TORCHRUN)


def local_environment(nproc: int, env: Mapping[str, str], node: Node | None = None) -> tuple[dict[str, str], list[str]]:
    """(the environment for a run on this machine, made from `env`; notes for the user about what was changed).

    `node`: which of several machines this is; its `nproc` processes are a part of the run.
    """
    ignored, kind = left_behind(env), "a local launch" if node is None else "this launch"
    kept = {name: value for name, value in env.items() if name not in ignored and name not in OWN}
    notes = [f"ignored, as {kind} sets its own values: {', '.join(ignored)}"] if ignored else []
    if node is None:
        waits, note = _name_servers(kept)
        notes += [note] if note else []
        connect = loopback() | waits
    else:
        connect = {"PET_RDZV_CONF": f"timeout={node.join_s}"}
        connect |= {"GLOO_SOCKET_IFNAME": node.interface} if node.interface else {}
    own = {
        # otherwise torchrun makes a folder for error files in the temporary directory and leaves it there
        "PET_LOG_DIR": os.devnull,
        LAUNCH: uuid.uuid4().hex,
        "PET_SIGNALS_TO_HANDLE": ",".join(one.name for one in SIGNALS),
    }
    return {"OMP_NUM_THREADS": threads(nproc)} | connect | kept | own, notes


def torchrun_line(
    overrides: Sequence[str],
    nproc: int,
    *,
    port: int | None = None,
    restarts: int = 0,
    node: Node | None = None,
    program: str = "train/main.py",
) -> list[str]:
    """torchrun's arguments for one run on this machine, with its address, so that no host name is looked up.

    `nproc`: the number of processes on this machine. `node`: which of several machines it is; its port counts then.
    `program`: of this source tree, which every rank runs.
    """
    if node is None:
        where = ["--standalone" if port is None else f"--master_port={port}", "--local_addr=127.0.0.1"]
    else:
        where = [f"--nnodes={node.count}", f"--node_rank={node.number}"]
        where += [f"--master_addr={node.head}", f"--master_port={node.port}"]
        where += [f"--local_addr={node.address}"] if node.address else []
    again = [f"--max_restarts={restarts}"] if restarts else []
    return [*where, f"--nproc_per_node={nproc}", *again, path_of(program), *overrides]


def source_path() -> dict[str, str]:
    """The PYTHONPATH with which a process imports the code of this source tree; nothing if the program is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {} if INSTALLED else {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def own_code() -> Iterator[None]:
    """Within this context, a Python process that is started imports the code of this program. A module in the working
    directory, for example a user's train.py, does not replace a module of this program."""
    before = dict(os.environ)
    os.environ.update({"PYTHONSAFEPATH": "1"} | source_path())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def loopback() -> dict[str, str]:
    """The variable with which gloo does not look up the address of this machine's name."""
    names = [name for _, name in socket.if_nameindex()]
    return {"GLOO_SOCKET_IFNAME": LOOPBACK} if LOOPBACK in names else {}


def _name_servers(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """(variables that shorten the look-up of names, a note for the user); both are empty if this machine's name has an
    address. torch looks up names even if it has addresses, and would wait long for a name without one."""
    if "RES_OPTIONS" in env:
        return {}, ""
    name = socket.gethostname()
    os.environ.update(SHORT_LOOKUP)  # for the look-up below too
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return SHORT_LOOKUP, f"the name of this machine, {name}, has no address: ranks connect at 127.0.0.1"
    finally:
        del os.environ["RES_OPTIONS"]
    return {}, ""
