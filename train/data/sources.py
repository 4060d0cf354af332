"""The data that a config names: a built-in source, a file or a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from train.config.problems import BadInput, Problem
from train.config.schema import Config, DataSource
from train.data import text, token_files
from train.data.text import Source
from train.data.tokens import InMemory, shown

NUM_SYNTHETIC_TOKENS = 2**20


def name_of(config: Config) -> str:
    """The key and value that chose the data, for messages."""
    data = config.data
    return f"data={data.source.value}" if data.path is None else f"data.path={shown(data.path)}"


def read(config: Config) -> Source:
    """The tokens that the config names. Raises BadInput for an unsuitable file, and OSError for an unreadable one."""
    source = config.data.source
    if source is DataSource.python_docs:
        return text.python_docs()
    if source is DataSource.python_source:
        return text.python_source()
    if source is DataSource.synthetic:
        vocab_size = config.model.vocab_size
        ids = np.random.default_rng(0).integers(0, vocab_size, NUM_SYNTHETIC_TOKENS).astype(np.uint32)
        return Source(InMemory(ids), f"{len(ids):,} random ids below {vocab_size:,}", is_bytes=False)
    path = _checked_path(config)
    if source is DataSource.tokens:
        return token_files.token_file(path, config)
    return text.json_lines(path, config) if source is DataSource.jsonl else text.text(path, config)


def _checked_path(config: Config) -> Path:
    """The path, which must be a file that is not empty, or a folder if the data can be one."""
    source, given = config.data.source, config.data.path
    if not given:
        raise BadInput(Problem("data_path", f"data={source.value} needs a path", "use data.path=FILE"))
    path, name = Path(given), name_of(config)
    if source is DataSource.tokens and not path.exists():
        path = path.with_name(f"{path.name}.idx")  # Megatron's own tools accept the name without an ending
    if not path.exists():
        raise BadInput(Problem("data_path", f"{name} does not exist", "use the path of a file that exists"))
    if path.is_dir():
        if source is DataSource.tokens:
            raise BadInput(Problem("data_path", f"{name} is a folder, but data=tokens reads one file", "use a file"))
    elif not path.is_file():
        raise BadInput(Problem("data_path", f"{name} is not a regular file", "use a file or a folder"))
    elif path.stat().st_size == 0:
        raise BadInput(Problem("data_path", f"{name} is empty", "use a file with text in it"))
    return path


def holds_text(source: DataSource) -> bool:
    """Whether the tokens of such data are the bytes of a text, and not ids of a tokenizer that is not known here."""
    return source not in (DataSource.tokens, DataSource.synthetic)
