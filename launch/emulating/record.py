"""The record of a run of launch.netlab, by which the next start finds what a killed one has left.

A record is a file in a folder of the user's own. It has the id and the start time of the process that owns the run, and
the run's mark, a random text that everything it starts has in its environment. Namespaces, links and shapers are held
by such processes, and end with them. What a process that is still alive owns is never touched.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launch.start.alive import with_variable
from train.config import plain_json
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.record.run_files import Unreadable, read_json, write_whole

MARK = "STRATEGY_LAB_NETLAB"  # the variable that has the mark
GONE_S = 10.0  # a killed process takes a moment to end


@dataclass(frozen=True)
class Record:
    """`boot`, `pid` and `started` name the process that owns the run: its id, the time of its start in ticks since the
    machine's, and which start of the machine that was."""

    mark: str
    boot: str
    pid: int
    started: int

    @classmethod
    def of_this_process(cls) -> Record:
        started = started_at(os.getpid())
        assert started is not None
        return cls(uuid.uuid4().hex, boot_id(), os.getpid(), started)

    @property
    def is_alive(self) -> bool:
        return self.boot == boot_id() and started_at(self.pid) == self.started


def boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def started_at(pid: int) -> int | None:
    """The start time of a process in ticks; None if there is no such process, or if it has ended and its parent does
    not know it yet."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *rest = text[text.rindex(")") + 2 :].split()  # a program's name may have blanks and brackets
    return None if state in "ZX" else int(rest[18])


def folder() -> Path:
    """The folder of this user's records, the same for every environment. Raises BadInput (exit code 3) if another user
    has made it."""
    own = Path(f"/run/user/{os.getuid()}")
    path = (own if os.access(own, os.W_OK) else Path("/tmp")) / f"strategy-lab-netlab-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        message = f"{path}, the folder of records, is not a folder that only this user can write"
        raise BadInput(Problem("netlab_records", message, "remove it", exit_code=EXIT_ENVIRONMENT))
    return path


@contextmanager
def recorded() -> Iterator[Record]:
    """The context of a run: its record exists as long, and nothing of it is alive afterwards."""
    record = Record.of_this_process()
    path = folder() / f"{record.mark}.json"
    write_whole(path, plain_json.dumps(asdict(record)) + "\n")
    try:
        yield record
    finally:
        end_marked(record.mark)
        path.unlink(missing_ok=True)


def end_marked(mark: str) -> int:
    """Kill every process with this mark, and return their number. Stopped ones end too."""
    processes = [one for one in with_variable(MARK, mark) if one.pid != os.getpid()]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GONE_S)
    return len(processes)


def clean_up() -> list[str]:
    """End what runs that were killed have left, and return a line for each of them."""
    lines = []
    for path in sorted(folder().glob("*.json")):
        record = _read(path)
        if record is None or record.is_alive:
            continue
        ended = end_marked(record.mark)
        path.unlink(missing_ok=True)
        left = f"{ended} process(es), with its hosts and links, were left and ended" if ended else "it left nothing"
        lines.append(f"launch.netlab of process {record.pid} was killed: {left}")
    return lines


def _read(path: Path) -> Record | None:
    """None for a file that is not a record: it decides nothing."""
    try:
        values = read_json(path) or {}
        mark, boot, pid, started = (values[name] for name in ("mark", "boot", "pid", "started"))
    except (Unreadable, KeyError):
        return None
    right = (
        isinstance(mark, str)
        and re.fullmatch(r"[0-9a-f]{32}", mark)
        and isinstance(pid, int)
        and isinstance(started, int)
    )
    return Record(mark, str(boot), pid, started) if right else None
