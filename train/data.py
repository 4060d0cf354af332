"""Real text without a download. A batch is a pure function of (seed, step): there is no loader state to save.

Tokens are the bytes of the text, or ids from a uint16 file. The corpus' tail is held out for validation. Torch is not
imported until a batch is made, so that bad data is found before anything starts.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.config import Config, DataSource
from train.problems import BadInput, Problem

if TYPE_CHECKING:
    from torch import Tensor

NUM_SYNTHETIC_TOKENS = 2**20
IGNORED = -100  # train.model.IGNORE_INDEX, without importing torch


@dataclass
class Corpus:
    """`training` and `validation`: 1-D arrays of token ids."""

    training: np.ndarray
    validation: np.ndarray
    seed: int
    seq_len: int
    ignore_token: int | None
    is_bytes: bool

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256(np.ascontiguousarray(self.training).data)
        digest.update(np.ascontiguousarray(self.validation).data)
        return digest.hexdigest()

    def batch(self, step: int, size: int, rows: slice) -> tuple[Tensor, Tensor]:
        """`rows` of the global batch of `size` windows at random places: (tokens, targets), int64 [rows, T]."""
        room = len(self.training) - self.seq_len
        starts = np.random.default_rng((self.seed, step)).integers(0, room, size)
        return self._windows(self.training, starts[rows])

    def validation_batch(self, index: int, count: int, size: int, rows: slice) -> tuple[Tensor, Tensor]:
        """`rows` of batch `index` of `count`: fixed windows, evenly spread over the held-out tail."""
        return self._windows(self.validation, self._validation_starts(count * size)[index * size :][:size][rows])

    def bigram_loss(self, count: int) -> float:
        """Mean loss (nats) on `count` validation windows of a byte bigram model fitted to the training part, with
        add-one smoothing: what a model without context beyond one byte can reach."""
        previous, following = self.training[:-1].astype(np.int64), self.training[1:]
        counts = np.bincount(previous * 256 + following, minlength=256 * 256).reshape(256, 256) + 1.0
        log_p = np.log(counts / counts.sum(1, keepdims=True))
        windows = self._validation_windows(count)
        losses = -log_p[windows[:, :-1], windows[:, 1:]]
        return float(losses[windows[:, 1:] != self.ignore_token].mean())

    def without_targets(self, count: int) -> str:
        """The part, or of the `count` validation windows all, in which no target carries loss; empty if none."""
        if self.ignore_token is None:
            return ""
        if not (self.training[1:] != self.ignore_token).any():
            return "the training part"
        if not (self._validation_windows(count)[:, 1:] != self.ignore_token).any():
            return "the validation windows"
        return ""

    def _validation_windows(self, count: int) -> np.ndarray:
        return self.validation[self._validation_starts(count)[:, None] + np.arange(self.seq_len + 1)]

    def _validation_starts(self, count: int) -> np.ndarray:
        return np.linspace(0, len(self.validation) - self.seq_len - 1, count).astype(np.int64)

    def _windows(self, tokens: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        import torch

        windows = torch.from_numpy(tokens[starts[:, None] + np.arange(self.seq_len + 1)].astype(np.int64))
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        if self.ignore_token is not None:
            # not in place: of a single row both slices are contiguous as they are, and share their memory
            targets = targets.masked_fill(targets == self.ignore_token, IGNORED)
        return inputs, targets


def load_corpus(config: Config) -> Corpus:
    """Read the corpus that the config names. Raises BadInput for a missing, empty, short or foreign file."""
    tokens = _read(config)
    source = f"data.path={config.data.path}" if config.data.path else f"data={config.data.source.value}"
    held_out = int(len(tokens) * config.data.validation_fraction)
    shorter = min(held_out, len(tokens) - held_out)
    if shorter < config.train.seq_len + 1:
        raise BadInput(
            Problem(
                "corpus_length",
                f"{source} holds {len(tokens)} tokens, {shorter} in the smaller of its training and validation parts, "
                f"but train.seq_len={config.train.seq_len} needs {config.train.seq_len + 1} in each",
                f"use train.seq_len={shorter - 1} or less, or more data" if shorter > 1 else "use more data",
                (f"train.seq_len={shorter - 1}",) if shorter > 1 else (),
            )
        )
    largest = max(int(chunk.max()) for chunk in np.array_split(tokens, len(tokens) // 2**26 + 1))
    if largest >= config.model.vocab_size:
        raise BadInput(
            Problem(
                "token_in_vocabulary",
                f"{source} contains token id {largest}, but model.vocab_size={config.model.vocab_size}",
                f"use model.vocab_size={largest + 1} or more, or another tokenisation",
                (f"model.vocab_size={largest + 1}",),
            )
        )
    corpus = Corpus(
        training=tokens[: len(tokens) - held_out],
        validation=tokens[len(tokens) - held_out :],
        seed=config.train.seed,
        seq_len=config.train.seq_len,
        ignore_token=config.data.ignore_token,
        is_bytes=config.data.source not in (DataSource.tokens, DataSource.synthetic),
    )
    if empty := corpus.without_targets(config.train.eval_batches * config.train.global_batch_size):
        raise BadInput(
            Problem(
                "targets",
                f"every target of {empty} of {source} is data.ignore_token={config.data.ignore_token}: no loss",
                "use another data.ignore_token or null, or more data",
                ("data.ignore_token=null",),
            )
        )
    return corpus


def _read(config: Config) -> np.ndarray:
    source = config.data.source
    if source is DataSource.python_docs:
        from pydoc_data.topics import topics

        return _bytes(topics[name].encode() for name in sorted(topics))
    if source is DataSource.python_source:
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
        modules = (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts))
        return _bytes(path.read_bytes() for path in modules)
    if source is DataSource.synthetic:
        return np.random.default_rng(0).integers(0, config.model.vocab_size, NUM_SYNTHETIC_TOKENS).astype(np.uint32)
    try:
        return _read_path(_checked_path(config), source)
    except OSError as error:
        path, file = config.data.path, error.filename
        what = path if file is None or str(file) == path else f"{path}, in it {file},"
        message = f"data.path={what} cannot be read ({error.strerror})"
        raise BadInput(Problem("data_path", message, "use readable files")) from error


def _read_path(path: Path, source: DataSource) -> np.ndarray:
    if source is DataSource.tokens:
        if path.stat().st_size % 2:
            raise BadInput(
                Problem("uint16_file", f"data.path={path} has an odd number of bytes", "data=tokens reads uint16 ids")
            )
        return np.memmap(path, dtype="<u2", mode="r")
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    return _bytes(p.read_bytes() for p in files)


def _bytes(parts: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"\n".join(parts), dtype=np.uint8)


def _checked_path(config: Config) -> Path:
    source, path = config.data.source.value, config.data.path
    if path is None:
        raise BadInput(Problem("data_path", f"data={source} needs a path", "use data.path=FILE"))
    found = Path(path)
    if not found.exists():
        raise BadInput(Problem("data_path", f"data.path={path} does not exist", "use the path of a file that does"))
    empty = found.stat().st_size == 0 if found.is_file() else not any(p.is_file() for p in found.rglob("*"))
    if found.is_dir() and config.data.source is DataSource.tokens:
        raise BadInput(Problem("data_path", f"data.path={path} is a folder", "data=tokens reads one file"))
    if empty:
        raise BadInput(Problem("data_path", f"data.path={path} is empty", "use a file with text in it"))
    return found
