"""An exported model: a folder with the file of the model and export.json, which says what it is. Torch is not imported.

export.json has the hash of every file, so that a file that is cut off or was exchanged is refused before a runtime sees
it. It is not signed: it protects from accidents, and not from somebody who changes both.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.exporting.targets import TARGETS, Target
from train.checkpoint.manifest import BLOCK, File, wrong_file
from train.config import plain_json
from train.config.problems import BadInput, Problem
from train.config.schema import ModelConfig
from train.record.run_files import Unreadable, clean, is_count, read_json, write_whole

NAME, FORMAT = "export.json", 1


@dataclass(frozen=True)
class Shape:
    """What the caller of a runtime must know: the slots of the cache are [L, B, K, S, E]."""

    vocab_size: int
    max_seq_len: int
    num_layers: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, model: ModelConfig) -> Shape:
        width = model.dim // model.num_heads
        return cls(model.vocab_size, model.max_seq_len, model.num_layers, model.num_kv_heads, width)


@dataclass(frozen=True)
class Artefact:
    """`facts`: texts for people, which are in the model's file too where its format has a place for them. `read_bytes`:
    how many bytes of weights a token reads. `checks`: what was measured when it was loaded back."""

    target: Target
    quant: str
    shape: Shape
    facts: dict[str, str]
    files: dict[str, File]
    read_bytes: int
    checks: dict[str, float]

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in self.files.values())

    def write(self, folder: Path) -> None:
        values = {"format": FORMAT, **dataclasses.asdict(self), "target": self.target.name}
        write_whole(folder / NAME, plain_json.dumps(values, indent=1) + "\n")


def measured(folder: Path) -> dict[str, File]:
    """The files of a folder, with their sizes and hashes."""
    found = {}
    for path in sorted(folder.iterdir()):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        found[path.name] = File(path.stat().st_size, digest.hexdigest())
    return found


def read(folder: Path) -> Artefact:
    """The artefact in a folder, whose files are as they were written. Raises BadInput."""
    try:
        values = read_json(folder / NAME)
    except Unreadable as error:
        raise _foreign(folder, str(error)) from error
    if values is None:
        raise _foreign(folder, f"it has no {NAME}")
    try:
        artefact = _checked(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _foreign(folder, f"{NAME} does not have the fields of an export") from error
    for name, file in artefact.files.items():
        if wrong := wrong_file(folder / name, file):
            raise _foreign(folder, wrong)
    return artefact


def _checked(values: dict[str, Any]) -> Artefact:
    target, shape = TARGETS[values["target"]], values["shape"]
    files = {name: File(int(one["bytes"]), str(one["sha256"])) for name, one in values["files"].items()}
    counts = [shape[field.name] for field in dataclasses.fields(Shape)]
    facts = {str(key): clean(value) for key, value in values["facts"].items()}
    checks = {str(key): float(value) for key, value in values["checks"].items() if value is not None}
    right = values["format"] == FORMAT and target.file in files and values["quant"] in target.quants
    if not right or not all(is_count(one) and one > 0 for one in counts) or not is_count(values["read_bytes"], 2**62):
        raise ValueError
    if any(Path(name).name != name for name in files):
        raise ValueError  # it would lead out of the folder
    return Artefact(target, values["quant"], Shape(*counts), facts, files, values["read_bytes"], checks)


def _foreign(folder: Path, why: str) -> BadInput:
    message = f"{folder} cannot be loaded: {why}"
    fix = "give a folder that scripts/export.py has written, or write it again"
    return BadInput(Problem("artefact", message, fix))
