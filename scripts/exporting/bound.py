"""How fast decoding can be at most, as each token reads all weights, and the keys and values of those before it.

    tokens/s <= memory bandwidth / bytes that a token reads

A model that stays in the processor's cache can be faster. Torch is not imported.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil

from scripts.exporting.artefact import Artefact, Shape
from train.config.schema import ModelConfig

LARGEST = 2**30  # bytes that are read to measure the bandwidth
PASSES = 5
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def read_bandwidth(threads: int) -> float:
    """The bytes that so many threads read in a second: the fastest of some passes over a large array."""
    size = min(LARGEST, psutil.virtual_memory().available // 4)
    parts = np.array_split(np.ones(size // 4, dtype=np.float32), threads)
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            start = time.perf_counter()
            list(pool.map(lambda part: float(np.dot(part, part)), parts))
            best = max(best, size / (time.perf_counter() - start))
    return best


def weights_read(model: ModelConfig, bytes_of_file: int, *, head_apart: bool) -> int:
    """The bytes of weights that a token reads: all but the embedding, of which it reads a row. `head_apart`: whether
    the file has a head that is not the embedding."""
    embedding = 4 * model.vocab_size * model.dim
    return bytes_of_file - (embedding if head_apart else 0)


def cache_bytes(shape: Shape, tokens: int) -> int:
    """The bytes of the keys and values of so many tokens, in float32."""
    return 2 * 4 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens


def most_tokens_per_s(artefact: Artefact, tokens: float, bandwidth: float) -> float:
    """The bound for a token with `tokens` others before it, on average."""
    return bandwidth / (artefact.read_bytes + cache_bytes(artefact.shape, 1) * tokens)


def processor_cache() -> int:
    """The bytes of the largest cache of the first processor; 0 if unknown."""
    sizes = [0]
    for file in CACHES.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:])
        if unit and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * unit)
    return max(sizes)
