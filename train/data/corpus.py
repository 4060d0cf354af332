"""The training and validation data. A batch is a pure function of (seed, step): there is no loader state to save.

Tokens are the bytes of a text, or ids from a file. The end of the corpus is the validation part. The checks of the data
do not import torch, so that bad data is refused before anything starts; they read only a part of a large corpus.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from train.config.fields import IGNORE_INDEX
from train.config.problems import BadInput, Problem
from train.config.schema import Config, TrainConfig
from train.data import sources
from train.data.text import Source
from train.data.tokens import Tokens, shown

if TYPE_CHECKING:
    from torch import Tensor

NUM_SYNTHETIC_TOKENS = 2**20
SCANNED = 2**28  # bytes of a corpus that the check reads; in a larger corpus each batch's ids are checked too
FITTED = 2**28  # bytes that the bigram model is fitted to
MOST_WINDOWS = 2**16  # the most validation windows on which the bigram model is evaluated
CHUNK = 2**20  # the number of tokens of windows that are read at once


@dataclass
class Corpus:
    """`training` and `validation`: sequences of token ids below `vocab_size`. `says`: a line that describes them."""

    training: Tokens
    validation: Tokens
    seed: int
    seq_len: int
    ignore_token: int | None
    is_bytes: bool
    vocab_size: int
    ids_checked: bool  # whether all ids were checked; if not, each batch's ids are checked
    name: str  # the key and value that chose the data, for messages
    says: str

    @cached_property
    def sha256(self) -> str:
        """The hash of all tokens as they are stored. It reads the whole corpus."""
        digest = hashlib.sha256()
        for part in (self.training, self.validation):
            for block in part.blocks():
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    def batch(self, step: int, size: int, rows: slice) -> tuple[Tensor, Tensor]:
        """`rows` of the global batch of `size` windows at random positions: (tokens, targets), int64 [rows, T]."""
        return self._tensors(self._windows(self.training, self._starts(step, size)[rows]))

    def valid_targets(self, step: int, size: int) -> np.ndarray:
        """The number of targets with a loss in every row of the global batch: [size]."""
        return (self._windows(self.training, self._starts(step, size))[:, 1:] != self.ignore_token).sum(1)

    def any_target(self, step: int, size: int) -> bool:
        """Whether any target of the global batch has a loss. It reads rows only until it finds one."""
        if self.ignore_token is None:
            return True
        starts = self._starts(step, size)
        rows = (self.training.windows(starts[row : row + 1], self.seq_len + 1) for row in range(size))
        return any(bool((row[:, 1:] != self.ignore_token).any()) for row in rows)

    def validation_batch(self, index: int, count: int, size: int, rows: slice) -> tuple[Tensor, Tensor]:
        """`rows` of validation batch `index` of `count`: fixed windows, spread evenly over the validation part."""
        indices = np.arange(index * size, (index + 1) * size)[rows]
        return self._tensors(self._windows(self.validation, self._validation_starts(indices, count * size)))

    def bigram_loss(self, count: int) -> float:
        """The mean loss (nats) on `count` validation windows of a byte bigram model that is fitted to the training part
        with add-one smoothing: what a model with a context of one byte can reach. Where there are more windows than
        MOST_WINDOWS or bytes than FITTED, it uses so many of them, spread evenly."""
        counts = np.ones(256 * 256)
        for block in self.training.blocks(FITTED, overlap=1):
            counts += np.bincount(block[:-1].astype(np.int64) * 256 + block[1:], minlength=256 * 256)
        table = counts.reshape(256, 256)
        log_p = np.log(table / table.sum(1, keepdims=True))
        total = number = 0.0
        for windows in self._validation_windows(count):
            losses = -log_p[windows[:, :-1], windows[:, 1:]][windows[:, 1:] != self.ignore_token]
            total, number = total + float(losses.sum()), number + losses.size
        return total / number if number else float("nan")

    def without_targets(self, count: int) -> str:
        """The name of what has no target with a loss: the training part or the `count` validation windows. Empty if
        both have one, or if a part is too large to be read in full."""
        if self.ignore_token is None:
            return ""
        valid = (bool((block[1:] != self.ignore_token).any()) for block in self.training.blocks(SCANNED, overlap=1))
        if self.training.fits(SCANNED) and not any(valid):
            return "the training part"
        valid = (bool((windows[:, 1:] != self.ignore_token).any()) for windows in self._validation_windows(count))
        if count <= MOST_WINDOWS and not any(valid):
            return "the validation windows"
        return ""

    def _starts(self, step: int, size: int) -> np.ndarray:
        room = len(self.training) - self.seq_len
        return np.random.default_rng((self.seed, step)).integers(0, room, size)

    def _validation_windows(self, count: int) -> Iterator[np.ndarray]:
        """The windows of an evaluation, at most MOST_WINDOWS of them, in blocks."""
        rows = max(CHUNK // (self.seq_len + 1), 1)
        chosen = min(count, MOST_WINDOWS)
        for start in range(0, chosen, rows):
            indices = np.arange(start, min(start + rows, chosen))
            yield self._windows(self.validation, self._validation_starts(indices, chosen))

    def _validation_starts(self, indices: np.ndarray, count: int) -> np.ndarray:
        """Elements `indices` of np.linspace from the first to the last position, without a `count`-long array."""
        last = len(self.validation) - self.seq_len - 1
        starts = (indices * (last / max(count - 1, 1))).astype(np.int64)
        return np.where((indices == count - 1) & (count > 1), last, starts)

    def _windows(self, tokens: Tokens, starts: np.ndarray) -> np.ndarray:
        windows = tokens.windows(starts, self.seq_len + 1)
        if not self.ids_checked:
            _refuse_ids([windows], self.vocab_size, self.name)
        return windows

    def _tensors(self, windows: np.ndarray) -> tuple[Tensor, Tensor]:
        import torch

        # New arrays, because slices of a single row would share their memory and have the strides of a longer row,
        # which torch 2.11's pipelines refuse.
        inputs, targets = (
            torch.from_numpy(part.astype(np.int64, order="C")) for part in (windows[:, :-1], windows[:, 1:])
        )
        if self.ignore_token is not None:
            targets[targets == self.ignore_token] = IGNORE_INDEX
        return inputs, targets


def load_corpus(config: Config) -> Corpus:
    """The corpus that the config names. Raises BadInput if it is missing, empty, too short or in another format."""
    try:
        return checked(config, sources.read(config))
    except OSError as error:
        path, file = config.data.path, error.filename
        what = shown(path) if file is None or str(file) == path else f"{shown(path)} ({shown(file)} in it)"
        message = f"data.path={what} cannot be read ({error.strerror})"
        raise BadInput(Problem("data_path", message, "use readable files")) from error


def checked(config: Config, source: Source) -> Corpus:
    """The corpus of tokens that have been read. Raises BadInput if they do not suit the config."""
    tokens, name, train = source.tokens, sources.name_of(config), config.train
    held_out = int(len(tokens) * config.data.validation_fraction)
    _check_length(name, len(tokens), held_out, train.seq_len)
    limits = np.iinfo(tokens.dtype)
    may_exceed = limits.min < 0 or limits.max >= config.model.vocab_size
    if may_exceed:
        _refuse_ids(tokens.blocks(SCANNED), config.model.vocab_size, name)
    corpus = Corpus(
        training=tokens.part(0, len(tokens) - held_out),
        validation=tokens.part(len(tokens) - held_out, len(tokens)),
        seed=train.seed,
        seq_len=train.seq_len,
        ignore_token=config.data.ignore_token,
        is_bytes=source.is_bytes,
        vocab_size=config.model.vocab_size,
        ids_checked=not may_exceed or tokens.fits(SCANNED),
        name=name,
        says=source.says,
    )
    _check_windows(corpus, train)
    return corpus


def _check_windows(corpus: Corpus, train: TrainConfig) -> None:
    places = len(corpus.validation) - train.seq_len
    most = max(-(-places // train.global_batch_size), type(train).eval_batches)
    if train.eval_batches > most:
        message = f"train.eval_batches={train.eval_batches} x train.global_batch_size={train.global_batch_size} windows"
        message += f" are more than the {places:,} places that the validation part of {corpus.name} has for windows"
        fix = f"use train.eval_batches={most} or less"
        raise BadInput(Problem("eval_batches", message, fix, (f"train.eval_batches={most}",)))
    if empty := corpus.without_targets(train.eval_batches * train.global_batch_size):
        message = f"every target of {empty} of {corpus.name} is data.ignore_token={corpus.ignore_token}, "
        message += "so that there is no loss"
        fix = "use another data.ignore_token or null, or more data"
        raise BadInput(Problem("targets", message, fix, ("data.ignore_token=null",)))


def _check_length(name: str, count: int, held_out: int, seq_len: int) -> None:
    shorter = min(held_out, count - held_out)
    if shorter > seq_len:
        return
    message = f"{name} holds {count} tokens, {shorter} in the smaller of its training and validation parts, "
    message += f"but train.seq_len={seq_len} needs {seq_len + 1} in each"
    if shorter < 2:
        raise BadInput(Problem("corpus_length", message, "use more data, or another data.validation_fraction"))
    fix = f"use train.seq_len={shorter - 1} or less, more data, or another data.validation_fraction"
    raise BadInput(Problem("corpus_length", message, fix, (f"train.seq_len={shorter - 1}",)))


def _refuse_ids(blocks: Iterable[np.ndarray], vocab_size: int, name: str) -> None:
    """Raise BadInput if an id is not in the vocabulary."""
    ends = [(int(block.min()), int(block.max())) for block in blocks]
    least, largest = min(low for low, _ in ends), max(high for _, high in ends)
    if least < 0:
        message = f"{name} contains token id {least}, but token ids must not be negative"
        raise BadInput(Problem("token_in_vocabulary", message, "use another data.dtype, or another tokenisation"))
    if largest >= vocab_size:
        message = f"{name} contains token id {largest}, but model.vocab_size={vocab_size}"
        fix = f"use model.vocab_size={largest + 1} or more, or another tokenisation"
        raise BadInput(Problem("token_in_vocabulary", message, fix, (f"model.vocab_size={largest + 1}",)))
