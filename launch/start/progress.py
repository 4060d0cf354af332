"""How far the run of a sweep's point has come: on a terminal in place, elsewhere a few words a minute."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

EVERY_S = 60.0  # where output is no terminal
TAIL = 2**20  # bytes of metrics.jsonl that are looked at: a line has a few dozen for each rank
HEAD = 2**16  # bytes of the log


class Progress:
    """`run_file`: where rank 0 names its run's directory. `log`: the run's output."""

    def __init__(self, run_file: Path, log: Path) -> None:
        self.run_file, self.log = run_file, log
        self.in_place = sys.stdout.isatty()
        self.shown, self.since = "", time.monotonic()

    def show(self) -> None:
        """Print the step if there is a new one, and it is time."""
        if not self.in_place and time.monotonic() < self.since + EVERY_S:
            return
        text = self.text()
        if text in ("", self.shown):
            return
        if self.in_place:
            back = "\b" * len(self.shown)
            print(f"{back}{text}{' ' * (len(self.shown) - len(text))}", end="", flush=True)
            print("\b" * max(len(self.shown) - len(text), 0), end="", flush=True)
        else:
            print(f"{text} ...", end=" ", flush=True)
        self.shown, self.since = text, time.monotonic()

    def clear(self) -> None:
        """Take back what stands on a terminal: the point's result follows."""
        if self.in_place:
            size = len(self.shown)
            print("\b" * size + " " * size + "\b" * size, end="", flush=True)

    def text(self) -> str:
        """`step 40/100`; empty before the first step."""
        with suppress(OSError, ValueError):
            steps = re.findall(
                rb'^\{"step": (\d+),', _end_of(Path(self.run_file.read_text().strip()) / "metrics.jsonl"), re.M
            )
            with self.log.open("rb") as log:
                total = re.search(rb"^step +\d+/(\d+) ", log.read(HEAD), re.MULTILINE)
            if steps:
                return f"step {int(steps[-1])}" + (f"/{int(total[1])}" if total else "")
        return ""


def _end_of(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - TAIL, 0))
        return file.read()
