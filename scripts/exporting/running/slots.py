"""What reads a prompt and then token by token, and the slots with keys and values that a graph needs for it.

Shapes: B batch, T tokens, V vocabulary, L layers, K key-value heads, S slots, E head width. The graph is that of
scripts/generating/cache.py: (tokens BT, position, keys LBKSE, values LBKSE) -> (logits BTV, keys LBKTE, values LBKTE).
Torch is not imported.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from scripts.exporting.artefact import Shape

MORE = 64  # slots that are added at once: all of them are read for each token, and adding some copies the others

Array = np.ndarray
Graph = Callable[[Array, Array, Array, Array], tuple[Array, Array, Array]]


class Full(ValueError):
    """The model has no position left."""


class Stepwise(ABC):
    """A model that keeps what it has read: `start` reads a prompt, `step` one token more, and both give the logits V of
    what follows."""

    shape: Shape

    @abstractmethod
    def start(self, prompt_T: Array) -> Array: ...

    @abstractmethod
    def step(self, token: int) -> Array: ...

    def speed(self, prompt_T: Array, count: int) -> tuple[float, float]:
        """The seconds from a prompt to the first token that follows, and the tokens/s of the next `count`."""
        begin = time.perf_counter()
        token = int(self.start(prompt_T).argmax())
        first = time.perf_counter()
        for _ in range(count):
            token = int(self.step(token).argmax())
        return first - begin, count / (time.perf_counter() - first)


class Slotted(Stepwise):
    """A runtime that runs a graph. `batched`: whether the graph takes several sequences at once."""

    def __init__(self, graph: Graph, shape: Shape, *, batched: bool) -> None:
        self.graph, self.shape, self.batched = graph, shape, batched
        self.filled = 0
        self.keys, self.values = self._empty(1, MORE)

    def logits(self, tokens_BT: Array) -> Array:
        """The logits BTV of whole sequences, without keys and values of earlier tokens."""
        parts = [tokens_BT] if self.batched else np.split(tokens_BT, len(tokens_BT))
        return np.concatenate([self._run(part, 0, *self._empty(len(part), 1))[0] for part in parts])

    def start(self, prompt_T: Array) -> Array:
        self.filled = 0
        self.keys, self.values = self._empty(1, MORE)
        return self._read(np.asarray(prompt_T, dtype=np.int64))

    def step(self, token: int) -> Array:
        return self._read(np.array([token], dtype=np.int64))

    def _read(self, tokens_T: Array) -> Array:
        end = self.filled + len(tokens_T)
        if end > self.shape.max_seq_len:
            raise Full(f"the model has {self.shape.max_seq_len} positions, and {end} tokens have no room in them")
        while end > self.keys.shape[3]:
            more = self._empty(1, min(MORE, self.shape.max_seq_len - self.keys.shape[3]))
            self.keys, self.values = (np.concatenate(pair, axis=3) for pair in zip(self._slots(), more, strict=True))
        logits, keys, values = self._run(tokens_T[None], self.filled, *self._slots())
        self.keys[:, :, :, self.filled : end], self.values[:, :, :, self.filled : end] = keys, values
        self.filled = end
        return logits[0, -1]

    def _run(self, tokens_BT: Array, position: int, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        return self.graph(tokens_BT, np.array([position], dtype=np.int64), keys, values)

    def _slots(self) -> tuple[Array, Array]:
        return self.keys, self.values

    def _empty(self, batch: int, slots: int) -> tuple[Array, Array]:
        one = self.shape
        shape = (one.num_layers, batch, one.num_kv_heads, min(slots, one.max_seq_len), one.head_dim)
        return np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
