"""The keys under `data`: the text that is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from omegaconf import MISSING

from train.config.fields import key, number


class DataSource(Enum):
    python_docs = "python_docs"
    python_source = "python_source"
    text = "text"
    jsonl = "jsonl"
    tokens = "tokens"
    synthetic = "synthetic"


class TokenType(Enum):
    """The type of the ids in a token file without a header. All types are little-endian."""

    auto = "auto"  # detected from the file's bytes; the file is refused if this is not certain
    uint8 = "uint8"
    uint16 = "uint16"
    uint32 = "uint32"
    int32 = "int32"
    int64 = "int64"


@dataclass
class DataConfig:
    source: DataSource = key(MISSING, "The kind of data; data=NAME sets it.")
    path: str | None = key(
        None, "The file, or for data=text and data=jsonl the folder of files, to train on; ~ is the home folder."
    )
    dtype: TokenType = key(
        TokenType.auto,
        "The type of the ids in a token file without a header (data=tokens); auto detects it from the file's bytes.",
    )
    glob: str | None = key(
        None, "Which files of the folder are read (data=text and data=jsonl), as *.txt or docs/**/*.md."
    )
    field: str | None = key(None, "The field of each line that holds the text (data=jsonl).")
    validation_fraction: float = number(
        0.1, "The share of the tokens, at the end of the data, that is held out for validation.", gt=0, lt=1
    )
    ignore_token: int | None = key(None, "Targets that equal this token id are left out of the loss.")
