"""The command line and the environment with which launchers start torchrun on this machine.

A local run needs no host name: its ranks connect at 127.0.0.1. Variables from another launch are left out with a note:
`RANK`, `WORLD_SIZE` and the like, and `PET_*`, which would override torchrun's arguments. nodes.py has the command line
of one of several machines.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from launch.start.nodes import Node
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
    connect = node.environment if node else loopback()
    if node is None:
        waits, note = _name_servers(kept)
        connect, notes = connect | waits, notes + ([note] if note else [])
    own = {
        # otherwise torchrun makes a folder for error files in the temporary directory and leaves it there
        "PET_LOG_DIR": os.devnull,
        LAUNCH: uuid.uuid4().hex,
        "PET_SIGNALS_TO_HANDLE": ",".join(one.name for one in SIGNALS),
    }
    return {"OMP_NUM_THREADS": threads(nproc)} | connect | kept | own, notes


def torchrun_line(overrides: Sequence[str], nproc: int, *, port: int | None = None, restarts: int = 0) -> list[str]:
    """torchrun's arguments for one run on this machine, with its address, so that no host name is looked up."""
    where = "--standalone" if port is None else f"--master_port={port}"
    again = [f"--max_restarts={restarts}"] if restarts else []
    how = [where, "--local_addr=127.0.0.1", f"--nproc_per_node={nproc}", *again]
    return [*how, path_of("train/main.py"), *overrides]


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
