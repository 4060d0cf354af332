"""The progress of a sweep's run: updated in place on a terminal, and otherwise printed once a minute."""

from __future__ import annotations

import re
import sys
import time
from contextlib import suppress
from pathlib import Path

EVERY_S = 60.0  # the interval if the output is not a terminal
TAIL = 2**20  # bytes at the end of metrics.jsonl that are read: a line has a few dozen per rank
HEAD = 2**16  # bytes at the start of the log that are read


class Progress:
    """`run_file`: the file in which rank 0 writes the path of its run's directory. `log`: the run's output."""

    def __init__(self, run_file: Path, log: Path) -> None:
        self.run_file, self.log = run_file, log
        self.in_place = sys.stdout.isatty()
        self.shown, self.since = "", time.monotonic()

    def show(self) -> None:
        """Print the step if it is new, and on a terminal or after EVERY_S."""
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
        """Erase the progress from a terminal, before the result of the point is printed."""
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
