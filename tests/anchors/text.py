"""A text, and what a run reads of it, worked out again with numpy only: batches, validation windows, bigram loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

NO_LOSS = -100  # torch's and transformers' ignore_index
SPACE = 32


def write_text(path: Path) -> None:
    """Words of random letters between spaces, and long stretches of spaces, so that microbatches have different numbers
    of targets with a loss, and some have none."""
    rng = np.random.default_rng(3)
    parts = []
    for _ in range(300):
        words = ["".join(rng.choice(list("aaabbcdeeeefgh"), rng.integers(1, 7))) for _ in range(8)]
        parts.append(" ".join(words) + " " * int(rng.integers(1, 60)))
    path.write_text("".join(parts))


@dataclass(frozen=True)
class Text:
    """The bytes of a file. The last tenth is held out."""

    training: np.ndarray
    held_out: np.ndarray
    seq_len: int

    @classmethod
    def read(cls, path: Path, seq_len: int) -> Text:
        whole = np.frombuffer(path.read_bytes(), np.uint8).astype(np.int64)
        cut = len(whole) - len(whole) // 10
        return cls(whole[:cut], whole[cut:], seq_len)

    def batch(self, seed: int, step: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets BT of a step: the windows at random positions."""
        starts = np.random.default_rng((seed, step)).integers(0, len(self.training) - self.seq_len, rows)
        return self._windows(self.training, starts)

    def validation(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of all `count` validation windows, spread evenly from the first position to the last."""
        starts = np.linspace(0, len(self.held_out) - self.seq_len - 1, count).astype(np.int64)
        return self._windows(self.held_out, starts)

    def bigram_loss(self, count: int) -> float:
        """The mean of -log p(byte | byte before) over the validation targets that have a loss, where p is counted in
        the training part, with one added to each count."""
        counts = np.ones((256, 256))
        np.add.at(counts, (self.training[:-1], self.training[1:]), 1)
        tokens, targets = self.validation(count)
        pairs = [(a, b) for a, b in zip(tokens.ravel(), targets.ravel(), strict=True) if b != NO_LOSS]
        return float(np.mean([np.log(counts[a].sum() / counts[a, b]) for a, b in pairs]))

    def _windows(self, part: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.stack([part[start : start + self.seq_len] for start in starts])
        targets = np.stack([part[start + 1 : start + 1 + self.seq_len] for start in starts])
        return tokens, np.where(targets == SPACE, NO_LOSS, targets)
