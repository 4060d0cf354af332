"""compression.json: what a compressed run is, what it was made of, and what was measured. Torch is not imported."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import plain_json
from train.config.problems import BadInput, Problem
from train.record.run_files import Unreadable, clean, exists, is_count, number, read_json, write_whole
from train.record.run_folder import COUNT, OBJECT, TEXT, Kind, check

COMPRESSION, WEIGHTS = "compression.json", "weights.safetensors"
FORMAT = 1
MOST_BYTES = 10**15  # of a model
HEX = re.compile(r"[0-9a-f]{64}")
QUIET = ("calibration",)  # options that a label leaves out


@dataclass(frozen=True)
class Side:
    """What was measured of a model. `loss`: on the validation tokens. `bytes`: of its weights on the disk, for a parent
    4 for each parameter. `resident_bytes`: of the tensors that the opened model holds. Speeds: in tokens/s, or None if
    they were not measured."""

    loss: float
    bytes: int
    resident_bytes: int
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None


@dataclass(frozen=True)
class Record:
    """`method`, `options`: as given. `before`: the parent; `after`: the compressed model. `control`: the loss of the
    parent trained on by as many steps with the same data and rate, for a method that trains. `parent`: its run and its
    hash. `training`: its overrides and processes, if there was one. `tokens`: of the validation. `timing`: how speeds
    were measured. `work`: the keys that decide the model and its validation (`record.run_dir.work`).
    `weights_sha256`: of the file."""

    method: str
    options: dict[str, Any]
    before: Side
    after: Side
    control: float | None
    parent: dict[str, Any]
    training: dict[str, Any]
    tokens: int
    timing: dict[str, Any]
    environment: dict[str, Any]
    work: dict[str, Any]
    weights_sha256: str
    command: str

    @property
    def label(self) -> str:
        """The method with its options, such as "prune_2_4 score=wanda retrain=500"."""
        return label(self.method, self.options)

    @property
    def against(self) -> float:
        """The loss that the model's loss is compared with: of the parent, trained on by as many steps as the model."""
        return self.before.loss if self.control is None else self.control

    @property
    def cost_pct(self) -> float:
        """How much larger its loss is, in % of the loss that it is compared with."""
        return 100 * (self.after.loss / self.against - 1)

    def values(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def write(self, folder: Path) -> None:
        write_whole(folder / COMPRESSION, plain_json.dumps(self.values(), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Raises BadInput if the file is not there, or not as `write` writes it."""
        try:
            values = read_json(folder / COMPRESSION)
            if values is None:
                raise Unreadable(f"it has no {COMPRESSION}")
            return cls.of(values)
        except (Unreadable, OSError) as error:
            message = f"{folder} is no compressed run: {clean(error)}"
            fix = "give a folder that scripts/compress.py has made"
            raise BadInput(Problem("compressed_run", message, fix)) from error

    @classmethod
    def of(cls, values: dict[str, Any]) -> Record:
        """The record of these values. Raises Unreadable."""
        if values.get("format") != FORMAT:
            raise Unreadable(f"{COMPRESSION} is of another version of the format")
        named: dict[str, Any] = {field.name: values.get(field.name) for field in dataclasses.fields(cls)}
        check(named, KINDS, COMPRESSION)
        named |= {name: _side(named[name], name) for name in ("before", "after")}
        return cls(**named)


def label(method: str, options: dict[str, Any]) -> str:
    """The method with the options that tell its results apart."""
    told = {name: value for name, value in options.items() if name not in QUIET}
    return " ".join([method, *(f"{name}={shown(value)}" for name, value in told.items())])


def is_compressed(path: Path) -> bool:
    """Whether the folder is a compressed run."""
    return exists(path / COMPRESSION)


def sha256_of(file: Path) -> str:
    """The hash of a file's content. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _side(values: dict[str, Any], name: str) -> Side:
    fields: dict[str, Any] = {field.name: values.get(field.name) for field in dataclasses.fields(Side)}
    check(fields, SIDE, f"{COMPRESSION}: {name}")
    return Side(**fields)


PLAIN: Kind = (
    "an object of texts, numbers and true or false",
    lambda value: isinstance(value, dict) and all(isinstance(x, str | bool | int | float) for x in value.values()),
)
LOSS: Kind = ("a loss above 0", lambda value: (found := number(value)) is not None and found > 0)
SPEED: Kind = ("a positive number or null", lambda v: v is None or ((found := number(v)) is not None and found > 0))
SIZE: Kind = ("a number of bytes", lambda value: is_count(value, MOST_BYTES) and value > 0)
HASH: Kind = ("a SHA-256", lambda value: isinstance(value, str) and HEX.fullmatch(value) is not None)
SIDE: dict[str, Kind] = {
    "loss": LOSS,
    "bytes": SIZE,
    "resident_bytes": SIZE,
    "prefill_tokens_per_s": SPEED,
    "decode_tokens_per_s": SPEED,
}
KINDS: dict[str, Kind] = {
    "method": TEXT,
    "options": PLAIN,
    "before": OBJECT,
    "after": OBJECT,
    "control": ("a loss above 0 or null", lambda value: value is None or LOSS[1](value)),
    "parent": OBJECT,
    "training": OBJECT,
    "tokens": COUNT,
    "timing": OBJECT,
    "environment": OBJECT,
    "work": OBJECT,
    "weights_sha256": HASH,
    "command": TEXT,
}
