"""The disk of the run directory, the temporary directory and /dev/shm: free space, and whether and how fast they take
what is written.

A child process tries them, as a disk that does not answer, such as a network file system that is gone, stops a process
for good.
"""

from __future__ import annotations

import fcntl
import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.examine.child import Answers, begin, say
from launch.examine.finding import Finding, error, ok, warning
from launch.start.folder import nearest, obstacle

RUNS, TEMPORARY, SHARED = "run directory", "temporary files", "/dev/shm"
GiB, MiB = 2**30, 2**20
LITTLE_GIB = 1.0  # a checkpoint has 12 bytes for each parameter (the weight and two moments in float32)
FULL_MIB = 16.0  # for the logs, events and samples of a run
SLOW_FSYNC_MS = 100.0  # each file of a checkpoint waits for the disk at least once
SHARED_GIB = 1.0  # Docker's default is 64 MiB
NUM_FSYNCS, LONGEST_S = 20, 1.0
WRITTEN_MIB = 16
IN_MEMORY = ("tmpfs", "ramfs")


def main() -> None:
    for name, folder in begin().items():
        say(**{name: try_folder(usable(folder) if name == TEMPORARY else folder)})


def usable(folder: str) -> str:
    """Where programs keep temporary files: `folder`, or another one if this one cannot be written. If there is none,
    the message names the one that should be."""
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:
        return folder


def try_folder(folder: str) -> dict[str, Any]:
    """What a file shows that is written into the folder, or into the nearest of its parents that exists. The file has
    no name, so that nothing stays behind."""
    if reason := obstacle(folder):
        return {"refused": os.strerror(reason)}
    found: dict[str, Any] = {}
    place = nearest(folder)
    try:
        space = os.statvfs(place)
        found |= {"place": str(place), "type": file_system(place)}
        found |= {"total_gib": space.f_blocks * space.f_frsize / GiB, "free_gib": space.f_bavail * space.f_frsize / GiB}
        found["files_left"] = space.f_favail if space.f_files else None  # some file systems do not count them
        with tempfile.TemporaryFile(dir=place) as file:
            found |= fsyncs(file.fileno())
            found["locks"] = can_lock(file.fileno())
    except OSError as why:
        found["refused"] = why.strerror or str(why)
    return found


def fsyncs(descriptor: int) -> dict[str, Any]:
    """The median time of an fsync after a small write, and the speed of one large write with its fsync."""
    times: list[float] = []
    block, started = os.urandom(MiB), time.perf_counter()
    while len(times) < NUM_FSYNCS and time.perf_counter() - started < LONGEST_S:
        os.write(descriptor, block[:4096])
        before = time.perf_counter()
        os.fsync(descriptor)
        times.append(time.perf_counter() - before)
    before = time.perf_counter()
    for _ in range(WRITTEN_MIB):
        os.write(descriptor, block)
    os.fsync(descriptor)
    return {
        "fsync_ms": statistics.median(times) * 1e3,
        "write_mib_per_s": WRITTEN_MIB / (time.perf_counter() - before),
    }


def can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def file_system(place: Path) -> str:
    """The type of the file system, as tmpfs or nfs4; empty if it is not known."""
    try:
        import psutil
    except ImportError:  # a finding about packages
        return ""
    return type_of(place.resolve(), ((one.mountpoint, one.fstype) for one in psutil.disk_partitions(all=True)))


def type_of(place: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The type of the last mount among those with the longest path, as a later mount hides an earlier one."""
    best, found = -1, ""
    for point, kind in mounts:
        if place.is_relative_to(point) and len(point) >= best:
            best, found = len(point), kind
    return found


def judge(answers: Answers, folders: Mapping[str, str]) -> list[Finding]:
    """`folders`: the path of each of RUNS, TEMPORARY and SHARED that was tried."""
    found: list[Finding] = []
    for name, folder in folders.items():
        tried = answers.found.get(name)
        if tried is None:
            message = f"{folder} could not be tried: {answers.end}"
            fix = f"look whether its disk is there and answers (df {folder}), or use another folder"
            found.append(error(name, message, fix))
            break  # the others were not tried any more
        found += {RUNS: _runs, TEMPORARY: _temporary, SHARED: _shared}[name](folder, tried)
    return found


def _runs(folder: str, tried: Mapping[str, Any]) -> list[Finding]:
    use = "use metrics.dir=FOLDER with a folder on another disk"
    if "refused" in tried:
        message = f"metrics.dir={folder} cannot be written ({tried['refused']})"
        return [error(RUNS, message, "use metrics.dir=FOLDER with a folder that can be written", **tried)]
    free, kind = tried["free_gib"], tried["type"]
    shown = (
        f"metrics.dir={folder} ({kind or 'unknown file system'}): {free:.1f} of {tried['total_gib']:.1f} GiB are free, "
        f"an fsync takes {tried['fsync_ms']:.1f} ms, {tried['write_mib_per_s']:.0f} MiB/s are written"
    )
    if free * 1024 < FULL_MIB or tried["files_left"] == 0:
        what = "no more files can be made" if tried["files_left"] == 0 else f"{free * 1024:.0f} MiB are free"
        return [error(RUNS, f"the disk of metrics.dir={folder} is full: {what}", f"delete old runs, or {use}", **tried)]
    found = []
    if free < LITTLE_GIB:
        message = f"{shown}: that is room for small checkpoints only"
        found.append(warning(RUNS, message, f"delete old runs, or {use}", **tried))
    if kind in IN_MEMORY:
        message = f"{shown}: it is in memory, so runs take memory and are lost when the machine stops"
        found.append(warning(RUNS, message, use, **tried))
    if tried["fsync_ms"] > SLOW_FSYNC_MS:
        message = f"{shown}: each file of a checkpoint waits for an fsync"
        found.append(warning(RUNS, message, f"save less often, or {use}", **tried))
    if not tried["locks"]:
        message = f"{shown}: it has no locks, so nothing keeps two runs out of one directory"
        found.append(warning(RUNS, message, use, **tried))
    return found or [ok(RUNS, shown, **tried)]


def _temporary(folder: str, tried: Mapping[str, Any]) -> list[Finding]:
    fix = "export TMPDIR=FOLDER with a folder that can be written and has room"
    if "refused" in tried:
        return [error(TEMPORARY, f"{folder} cannot be written ({tried['refused']})", fix, **tried)]
    shown = f"{tried['place']}: {tried['free_gib']:.1f} GiB are free"
    if tried["free_gib"] * 1024 < FULL_MIB:
        return [warning(TEMPORARY, f"{shown}: compilation and the proof keep files there", fix, **tried)]
    return [ok(TEMPORARY, shown, **tried)]


def _shared(folder: str, tried: Mapping[str, Any]) -> list[Finding]:
    needs = "NCCL needs it where GPUs have no direct connection"
    fix = "start a container with --shm-size=8g or --ipc=host; in Kubernetes, mount an emptyDir of medium Memory"
    if "refused" in tried:
        return [warning(SHARED, f"it cannot be written ({tried['refused']}): {needs}", fix, **tried)]
    shown = f"{tried['free_gib']:.2f} of {tried['total_gib']:.2f} GiB are free"
    if tried["free_gib"] < SHARED_GIB:
        return [warning(SHARED, f"{shown}: {needs}, and may fail with less than {SHARED_GIB:g}", fix, **tried)]
    return [ok(SHARED, shown, **tried)]


if __name__ == "__main__":
    main()
