"""The manifest of a checkpoint: what it holds, and the hash of every file. Torch is not imported.

A checkpoint is a folder `step-N` with the files of torch.distributed.checkpoint (`.metadata` and `__R_I.distcp`) and
`manifest.json`. The folder gets this name only when everything in it is on the disk, so a folder with another name is
not complete. Nothing in a checkpoint is trusted before its hash has been compared.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.command.resources import words_of
from train.config import plain_json
from train.config.problems import BadInput, Problem
from train.record.run_files import MOST_CHARS

MANIFEST, METADATA = "manifest.json", ".metadata"
FORMAT = 1
FILE = re.compile(r"\.metadata|__\d{1,6}_\d{1,4}\.distcp")
DTYPES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}
MOST_BYTES, MOST_DIMS = 256 * 2**20, 8  # of a manifest; of a tensor
BLOCK = 8 * 2**20  # bytes that are hashed at once
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """A file of the checkpoint: its size and its SHA-256."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Stored:
    """A tensor of the checkpoint: its whole shape, and torch's name of its type."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """`layout`: the strategy, its degrees and the number of ranks, which decide what only the same layout can read.
    `versions`: of the program, torch and Python. `work`: the keys that decide the numbers of the run
    (`record.run_dir.work`), with the hash of its text. `config_sha256`: the hash of the whole config."""

    step: int
    files: dict[str, File]
    tensors: dict[str, Stored]
    layout: dict[str, Any]
    versions: dict[str, str]
    work: dict[str, Any]
    config_sha256: str

    def write(self, folder: Path) -> None:
        """Write manifest.json, with the hash of its own content, and make sure that it is on the disk."""
        values = {"format": FORMAT, **dataclasses.asdict(self)}
        values["sha256"] = _digest(values)
        with (folder / MANIFEST).open("x", encoding="utf-8") as file:
            file.write(plain_json.dumps(values, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check manifest.json, but no other file. Raises Damaged."""
        path = folder / MANIFEST
        try:
            with _opened(path) as file:
                content = file.read(MOST_BYTES + 1)
            if len(content) > MOST_BYTES:
                raise Damaged(folder, f"{MANIFEST} is larger than {MOST_BYTES:,} bytes")
            values = json.loads(content)
            right = isinstance(values, dict) and values.pop("sha256", None) == _digest(values)
        except OSError as error:
            raise Damaged(folder, f"{MANIFEST} cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise Damaged(folder, f"{MANIFEST} is not valid JSON") from error
        if not right:
            raise Damaged(folder, f"{MANIFEST} does not have the content that was written")
        if values.pop("format", None) != FORMAT:
            raise Damaged(folder, f"{MANIFEST} is of another version of the format")
        try:
            return cls._checked(values)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Damaged(folder, f"{MANIFEST} does not have the fields of a manifest") from error

    @classmethod
    def _checked(cls, values: dict[str, Any]) -> Manifest:
        """The manifest of these values. A foreign manifest may have a right hash and impossible values."""
        files = {name: File(int(one["bytes"]), one["sha256"]) for name, one in values.pop("files").items()}
        tensors = {key: Stored(tuple(one["shape"]), one["dtype"]) for key, one in values.pop("tensors").items()}
        if not all(FILE.fullmatch(name) and HEX.fullmatch(one.sha256) for name, one in files.items()):
            raise ValueError
        for stored in tensors.values():
            sizes = stored.shape
            if stored.dtype not in DTYPES or len(sizes) > MOST_DIMS or any(type(n) is not int or n < 0 for n in sizes):
                raise ValueError
        manifest = cls(files=files, tensors=tensors, **values)
        if type(manifest.step) is not int or manifest.step < 1 or METADATA not in files:
            raise ValueError
        if sum(one.bytes for one in tensors.values()) > manifest.bytes:
            raise ValueError
        for one in (manifest.layout, manifest.layout["strategy"], manifest.versions, manifest.work):
            if not isinstance(one, dict):
                raise TypeError
        groups = [one for one in manifest.work.values() if isinstance(one, dict)]
        if any(isinstance(value, dict | list) for group in groups for value in group.values()):
            raise ValueError  # it may be nested deeper than Python's stack
        shown = [*tensors, *manifest.versions, *manifest.versions.values(), str(manifest.layout["world_size"])]
        if not all(text.isprintable() and len(text) <= MOST_CHARS for text in shown):
            raise ValueError
        return manifest

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(one.bytes for one in self.files.values())


class Damaged(BadInput):
    """A checkpoint is not complete, or not as it was written."""

    def __init__(self, folder: Path, why: str) -> None:
        self.why = why
        tool = " ".join(words_of("scripts/checkpoint.py"))
        fix = f"use another checkpoint of the run: python {tool} verify RUN says which are good"
        super().__init__(Problem("checkpoint", f"{folder} cannot be used: {why}", fix))


def wrong_files(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with the files of a checkpoint: one sentence for each file that is missing or has another size or
    hash. Of `parts` callers, each checks another part of the files. Files are hashed by several threads."""
    names = sorted(manifest.files)[part::parts]
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda name: wrong_file(folder / name, manifest.files[name]), names)
        return [sentence for sentence in found if sentence]


def wrong_file(path: Path, expected: File) -> str:
    """What is wrong with a file, in a sentence; empty if it is as it was written."""
    digest = hashlib.sha256()
    try:
        with _opened(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected.bytes:
                return f"{path.name} has {size:,} bytes, and not {expected.bytes:,}"
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if digest.hexdigest() == expected.sha256 else f"{path.name} has another SHA-256 than when it was written"


def _opened(path: Path) -> BinaryIO:
    """The open file, which is a regular one and no link: a pipe would keep a reader waiting. Raises OSError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file")
    return open(handle, "rb")


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
