"""The command line and the environment that a launcher on this machine gives torchrun, whatever stands in its own.

A local world needs no host name: its ranks meet at 127.0.0.1. What another launch left behind (`PET_*`, which would
override torchrun's own arguments, `RANK`, `WORLD_SIZE` …) is left out, and said to be.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

from train.command.resources import INSTALLED, ROOT, path_of
from train.config.world import AGENT, LOCK, NEEDED, PLACE, RUN_FILE

LOOPBACK = "lo"  # the name of the interface of 127.0.0.1 on Linux
OWN = (AGENT, LOCK, RUN_FILE)  # ours, left by a rank that starts a run itself: nothing to tell a user
SET_BY_TORCHRUN = {*PLACE, *NEEDED, "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME"} | {
    f"TORCHELASTIC_{name}" for name in ("RUN_ID", "RESTART_COUNT", "MAX_RESTARTS", "USE_AGENT_STORE", "ERROR_FILE")
}


def threads(nproc: int) -> str:
    """OMP_NUM_THREADS of each process: torchrun would give one to each of several, and leave cores idle."""
    return str(max((os.cpu_count() or 1) // nproc, 1))


def local_environment(nproc: int, env: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """The environment for a world of this machine, made from `env`, and lines that say what is not as a user set it."""
    ignored = sorted(name for name in env if name.startswith("PET_") or name in SET_BY_TORCHRUN)
    kept = {name: value for name, value in env.items() if name not in ignored and name not in OWN}
    notes = [f"ignored, as a local launch sets its own: {', '.join(ignored)}"] if ignored else []
    waits, note = _name_servers(kept)
    notes += [note] if note else []
    # torchrun would make a folder for error files in the temporary directory, and leave it there
    return {"OMP_NUM_THREADS": threads(nproc)} | loopback() | waits | kept | {"PET_LOG_DIR": os.devnull}, notes


def torchrun_line(overrides: Sequence[str], nproc: int, port: int | None = None) -> list[str]:
    """torchrun's arguments for one run on this machine, whose name it need not ask for."""
    where = "--standalone" if port is None else f"--master_port={port}"
    return [where, "--local_addr=127.0.0.1", f"--nproc_per_node={nproc}", path_of("train/main.py"), *overrides]


def become_torchrun(line: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Replace this program by torchrun, which keeps its process id: the ranks are told it, and end with it."""
    command = [sys.executable, "-P", "-m", "torch.distributed.run", *line]  # -P: as the command torchrun does
    os.execve(sys.executable, command, {**env, AGENT: str(os.getpid())})


def source_path() -> dict[str, str]:
    """The PYTHONPATH with which a process imports the code of this source tree; nothing if the program is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {} if INSTALLED else {"PYTHONPATH": os.pathsep.join(paths)}


@contextmanager
def own_code() -> Iterator[None]:
    """A Python process that is started meanwhile imports the code of this program. A module in the working directory,
    for example somebody's train.py, does not replace a module of this program."""
    before = dict(os.environ)
    os.environ.update({"PYTHONSAFEPATH": "1"} | source_path())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def loopback() -> dict[str, str]:
    """What keeps gloo from asking for the address of this machine's name."""
    names = [name for _, name in socket.if_nameindex()]
    return {"GLOO_SOCKET_IFNAME": LOOPBACK} if LOOPBACK in names else {}


def _name_servers(env: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """torch asks for names even where it has addresses. If this machine's own is not known, nobody waits long for it:
    (variables for it, what to say of it)."""
    short = {"RES_OPTIONS": "timeout:1 attempts:1"}  # of glibc's resolver, which waits 10 s or more for a name
    if "RES_OPTIONS" in env:
        return {}, ""
    name = socket.gethostname()
    os.environ.update(short)  # for this question too
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return short, f"the name of this machine, {name}, has no address: ranks meet at 127.0.0.1"
    finally:
        del os.environ["RES_OPTIONS"]
    return {}, ""
