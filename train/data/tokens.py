"""Sequences of token ids: an array in memory, the ids in a file, or the bytes of many files.

A text of 100 GB needs memory for the windows that are read from it only, or for one block where all of it is read.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import numpy as np

from train.config.problems import EXIT_ENVIRONMENT, Reported

BLOCK = 2**20  # tokens


class LostData(Reported, OSError):
    """A file of the data cannot be read any more, or became shorter. Before anything is trained, this is an OSError
    like any other; it ends a run, which the same command continues."""

    exit_code = EXIT_ENVIRONMENT
    cut_off = True
    of_one_rank = True  # the other ranks may read other parts of the file

    def report(self) -> str:
        fix = "put it back as it was; the same command line continues the run from its last checkpoint"
        return f"{shown(self.filename)} cannot be read any more ({self.strerror}): {fix}"


class Tokens(ABC):
    """A sequence of token ids of one dtype."""

    dtype: np.dtype

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def part(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` to `stop`, without reading them."""

    @abstractmethod
    def read(self, start: int, stop: int) -> np.ndarray: ...

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """[len(starts), length]: the tokens from each start."""
        found = np.empty((len(starts), length), self.dtype)
        for row, start in zip(found, starts.tolist(), strict=True):
            row[:] = self.read(start, start + length)
        return found

    def blocks(self, limit: int | None = None, overlap: int = 0) -> Iterator[np.ndarray]:
        """The tokens in blocks, each with the first `overlap` tokens of the next. `limit`: read about so many bytes at
        most, in blocks that are spread evenly from the first to the last."""
        starts = np.arange(0, max(len(self) - overlap, 0), BLOCK)
        if not self.fits(limit):
            assert limit is not None
            chosen = np.linspace(0, len(starts) - 1, max(limit // (BLOCK * self.dtype.itemsize), 1))
            starts = starts[chosen.astype(np.int64)]
        for start in starts.tolist():
            yield self.read(start, min(start + BLOCK + overlap, len(self)))

    def fits(self, limit: int | None) -> bool:
        """Whether `blocks` with this limit reads every token."""
        return limit is None or len(self) * self.dtype.itemsize <= limit


@dataclass(frozen=True)
class InMemory(Tokens):
    """An array in memory."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.array.dtype

    def __len__(self) -> int:
        return len(self.array)

    def part(self, start: int, stop: int) -> InMemory:
        return InMemory(self.array[start:stop])

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.array[start:stop]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        return self.array[starts[:, None] + np.arange(length)]


@dataclass(frozen=True)
class InFile(Tokens):
    """The ids in a file, from byte `offset` on. They are read when they are needed.

    The file is not memory-mapped: a map reads much more than each window, counts as the process's memory, and kills the
    process if the file becomes shorter.
    """

    path: Path
    dtype: np.dtype
    offset: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> InFile:
        return replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.windows(np.array([start]), stop - start)[0]

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        found = np.empty((len(starts), length), self.dtype)
        with _opened(self.path) as file:
            for row, start in zip(found, starts.tolist(), strict=True):
                _read_into(file, self.offset + (self.start + start) * self.dtype.itemsize, row)
        return found


@dataclass(frozen=True)
class JoinedFiles(Tokens):
    """The bytes of files, one after the other with a line feed between two. They are read when they are needed.

    `places[i]` is where file i begins; the last entry is one past the line feed that would follow the last file.
    """

    files: tuple[Path, ...]
    places: np.ndarray
    start: int
    stop: int

    @classmethod
    def of(cls, files: list[tuple[Path, int]]) -> JoinedFiles:
        """`files`: the paths with their sizes in bytes."""
        places = np.cumsum([0, *(size + 1 for _, size in files)])
        return cls(tuple(path for path, _ in files), places, 0, int(places[-1]) - 1)

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return np.dtype(np.uint8)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> JoinedFiles:
        return replace(self, start=self.start + start, stop=self.start + stop)

    def read(self, start: int, stop: int) -> np.ndarray:
        start, stop = self.start + start, self.start + stop
        found = np.full(stop - start, ord("\n"), np.uint8)
        first, last = np.searchsorted(self.places, [start, stop - 1], side="right") - 1
        for index in range(first, last + 1):
            begin, end = int(self.places[index]), int(self.places[index + 1]) - 1
            low, high = max(begin, start), min(end, stop)
            if low < high:
                with _opened(self.files[index]) as file:
                    _read_into(file, low - begin, found[low - start : high - start])
        return found


@contextmanager
def _opened(path: Path) -> Iterator[FileIO]:
    """The open file. Raises LostData if it cannot be opened, or if reading it within this context fails."""
    try:
        with path.open("rb", buffering=0) as file:
            yield file
    except LostData:
        raise
    except OSError as error:
        raise LostData(error.errno, error.strerror, str(path)) from error


def _read_into(file: FileIO, offset: int, room: np.ndarray) -> None:
    """Fill `room` with the bytes of the file from `offset` on. Raises LostData if it does not have them."""
    view = room.view(np.uint8).data
    while len(view):
        count = os.preadv(file.fileno(), [view], offset)
        if count == 0:
            raise LostData(errno.EIO, "it became shorter", str(file.name))
        view, offset = view[count:], offset + count


def shown(path: object) -> str:
    """A path for a message. It is escaped if it has line feeds or control characters."""
    text = str(path)
    return text if text.isprintable() else ascii(text)
