"""The cores, the memory and the limit of open files of this machine, or of the container that the doctor runs in."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.examine.finding import Finding, ok, warning
from launch.start.environment import threads

CGROUP = Path("/sys/fs/cgroup")  # in a container, its own limits
GiB = 2**30
RANK_GIB = 0.5  # a rank of the model tiny takes 0.43 GiB, most of it torch itself (README.md)
FEW_FILES = 1024  # a rank has a connection to each of its peers, and DeepSpeed and data loaders open many more


@dataclass(frozen=True)
class Machine:
    """`usable`: the cores that this process may use. `available`: bytes of memory that no other program uses.
    `files`: how many files a process may have open, and how many it may ask for."""

    cores: int
    usable: float
    total: int
    available: int
    files: tuple[int, int]


def here() -> Machine:
    import psutil

    from launch.describe.memory import machine

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    available = min(psutil.virtual_memory().available, memory_left(CGROUP))
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Machine(os.cpu_count() or 1, min(allowed, cpu_quota(CGROUP)), machine().bytes, int(available), files)


def cpu_quota(cgroup: Path) -> float:
    """The number of cores that a container may use; infinite if there is no limit."""
    file = cgroup / "cpu.max"
    quota, period = file.read_text().split() if file.exists() else ("max", "")
    return math.inf if quota == "max" else int(quota) / int(period)


def memory_left(cgroup: Path) -> float:
    """The bytes that a container may still take; infinite if there is no limit. Files in the page cache that are not in
    use do not count as taken."""
    file = cgroup / "memory.max"
    limit = file.read_text().strip() if file.exists() else "max"
    if limit == "max":
        return math.inf
    held = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    return int(limit) - int((cgroup / "memory.current").read_text()) + int(held.get("inactive_file", 0))


def judge(machine: Machine, nproc: int, env: Mapping[str, str]) -> list[Finding]:
    return [_cores(machine, nproc), *_threads(machine, nproc, env), _memory(machine, nproc), _files(machine)]


def _cores(machine: Machine, nproc: int) -> Finding:
    values = {"cores": machine.cores, "usable": machine.usable}
    part = f"{machine.usable:g} of {machine.cores} cores may be used" if machine.usable < machine.cores else ""
    shown = part or f"{machine.cores} cores"
    if nproc <= max(machine.usable, 1):
        return ok("cores", shown, **values)
    message = f"{shown}, but nproc={nproc} processes would share them, so that speeds say little"
    fix = f"use at most nproc={max(int(machine.usable), 1)} where speed is measured on a CPU"
    return warning("cores", message, fix, **values)


def _threads(machine: Machine, nproc: int, env: Mapping[str, str]) -> list[Finding]:
    """Whether the processes have more threads than there are cores, by OMP_NUM_THREADS or by the lab's own choice."""
    text, right = env.get("OMP_NUM_THREADS"), max(int(machine.usable) // nproc, 1)
    if text is not None and not (text.isascii() and text.isdigit() and int(text) > 0):
        message = f"OMP_NUM_THREADS={text} is not a number of threads, so each process takes one for every core"
        return [warning("threads", message, "unset OMP_NUM_THREADS")]
    each = int(text if text is not None else threads(nproc))
    where = f"OMP_NUM_THREADS={text}" if text is not None else "launch.local's own choice"
    shown = f"{each} thread(s) in each of {nproc} process(es), by {where}"
    if each <= right:
        return [ok("threads", shown, each=each)]
    message = f"{shown}: more than {machine.usable:g} core(s) can run at once, which makes a run much slower"
    free = text is not None and int(threads(nproc)) <= right
    fix = "unset OMP_NUM_THREADS" if free else f"export OMP_NUM_THREADS={right}"
    return [warning("threads", message, fix, each=each)]


def _memory(machine: Machine, nproc: int) -> Finding:
    total, available = machine.total / GiB, machine.available / GiB
    values = {"total_gib": total, "available_gib": available}
    shown = f"{available:.1f} of {total:.1f} GiB are free"
    if available >= RANK_GIB * nproc:
        return ok("memory", shown, **values)
    message = f"{shown}, but nproc={nproc} processes of the smallest model need about {RANK_GIB * nproc:.1f} GiB"
    return warning("memory", message, "end other programs, use fewer processes or a larger machine", **values)


def _files(machine: Machine) -> Finding:
    soft, hard = machine.files
    shown = "no limit" if soft == resource.RLIM_INFINITY else f"{soft:,} in each process"
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return ok("open files", shown, limit=soft)
    more = hard == resource.RLIM_INFINITY or hard >= FEW_FILES
    fix = f"ulimit -n {FEW_FILES}" if more else "ask for a higher limit (in Docker: --ulimit nofile=65536)"
    return warning("open files", f"{shown}: many processes together may need more than {FEW_FILES:,}", fix, limit=soft)
