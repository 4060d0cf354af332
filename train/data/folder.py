"""The files of a folder that make up a text. Links are followed; hidden and binary files are skipped and counted."""

from __future__ import annotations

import itertools
import os
import stat
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from train.config.problems import BadInput, Problem
from train.data.formats import HEAD, is_binary
from train.data.tokens import shown

MOST_ENTRIES = 50_000  # files and folders; to look at more takes too long for a check
SYSTEM = ("/proc", "/sys", "/dev")  # their entries are not files with text
JSON_LINES = (".jsonl", ".ndjson")

Identity = tuple[int, int]


@dataclass
class Folder:
    """`files`: paths and sizes, in the order in which they are read. `skipped`: the number of skipped files by kind."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def says(self) -> str:
        count, size = len(self.files), sum(size for _, size in self.files)
        left_out = f"; skipped: {self.left_out()}" if self.skipped else ""
        return f"{count:,} file{'s'[: count != 1]}, {size:,} bytes{left_out}"

    def left_out(self) -> str:
        return ", ".join(f"{kind} {number:,}" for kind, number in self.skipped.items())


def find(root: Path, pattern: str | None, *, json_lines: bool, runs: Path) -> Folder:
    """The text files, or with `json_lines` the files of JSON Lines, whose path below `root` matches the pattern.

    Raises BadInput if there are none or too many, and OSError for a file that cannot be read. `runs`: the folder that
    runs are written to, which is skipped.
    """
    found = _Walk(root, runs).folder()
    found.files.sort(key=lambda item: item[0].parts)
    wanted: list[tuple[Path, int]] = []
    for path, size in found.files:
        is_json = path.suffix.lower() in JSON_LINES
        if pattern is not None and not matches(path.relative_to(root).parts, pattern):
            found.skipped["left out by data.glob"] += 1
        elif pattern is None and json_lines and not is_json:
            found.skipped["without the ending .jsonl or .ndjson"] += 1
        elif pattern is None and not json_lines and is_json:
            found.skipped["JSON Lines (data=jsonl reads them)"] += 1
        elif size and is_binary(head_of(path)):
            found.skipped["binary"] += 1
        else:
            wanted.append((path, size))
    found.files = wanted
    if not any(size for _, size in wanted):
        why = f"holds nothing to read (skipped: {found.left_out()})" if found.skipped else "is empty"
        fix = "use a file or folder with text in it" + (f", or another data.glob than {pattern}" if pattern else "")
        raise BadInput(Problem("data_path", f"data.path={shown(root)} {why}", fix))
    return found


def head_of(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read(HEAD)


def matches(parts: Sequence[str], pattern: str) -> bool:
    """Whether a path matches a pattern such as *.txt (in any folder), docs/*.md or docs/**/*.md."""
    words = pattern.split("/") if "/" in pattern else ["**", pattern]
    return _matches(tuple(parts), tuple(word for word, _ in itertools.groupby(words) if word not in ("", ".")))


def _matches(parts: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not words:
        return not parts
    if words[0] == "**":
        return any(_matches(parts[start:], words[1:]) for start in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], words[0]) and _matches(parts[1:], words[1:])


class _Walk:
    """Visits every folder once: first the real folders, then those that links lead to."""

    def __init__(self, root: Path, runs: Path) -> None:
        self.root, self.found, self.entries = root, Folder(), 0
        self.seen: set[Identity] = set()
        self.links: list[Path] = []
        self.runs = _identity(os.stat(runs)) if os.path.isdir(runs) else None

    def folder(self) -> Folder:
        self._enter(self.root, os.stat(self.root))
        while self.links:
            link = self.links.pop(0)
            self._enter(link, os.stat(link))
        return self.found

    def _enter(self, path: Path, status: os.stat_result) -> None:
        todo = [(path, status)]
        while todo:
            path, status = todo.pop()
            if _identity(status) in self.seen:
                self.found.skipped["folders linked again"] += 1
            elif path != self.root and _identity(status) == self.runs:
                self.found.skipped["folders of runs"] += 1
            elif os.path.realpath(path) in SYSTEM:
                self.found.skipped["system folders"] += 1
            else:
                self.seen.add(_identity(status))
                todo += self._read(path)

    def _read(self, path: Path) -> list[tuple[Path, os.stat_result]]:
        """Add the files of one folder to what was found. Returns the folders in it that are not links."""
        with os.scandir(path) as scan:
            entries = list(itertools.islice(scan, MOST_ENTRIES + 1))
        self.entries += len(entries)
        if self.entries > MOST_ENTRIES:
            message = f"data.path={shown(self.root)} holds more than {MOST_ENTRIES:,} files and folders"
            raise BadInput(Problem("data_path", message, "use a folder inside it, or join its texts into fewer files"))
        below = []
        for entry in sorted(entries, key=lambda entry: entry.name):
            child = path / entry.name
            if entry.name.startswith("."):
                self.found.skipped["hidden"] += 1
                continue
            try:
                status = entry.stat()
            except OSError:
                if not entry.is_symlink():
                    raise
                self.found.skipped["broken links"] += 1
                continue
            if stat.S_ISREG(status.st_mode):
                self.found.files.append((child, status.st_size))
            elif not stat.S_ISDIR(status.st_mode):
                self.found.skipped["special files"] += 1
            elif entry.is_symlink():
                self.links.append(child)
            else:
                below.append((child, status))
        return below


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
