"""The type of the ids in a file without a header. It follows from the bytes without doubt, or the file is refused.

The file is read as little-endian words of 2 bytes. Ids of a real vocabulary (below 2^22) have these patterns:

    int64         of every four words, the third and the fourth are 0, and the second is below 64
    uint32        every second word is 0, or it is below 64 while most words between are not
    uint16        even and odd words have similar values; a word's upper byte is smaller than its lower one on average

Everything else is refused, and the fix is data.dtype: ids of one byte (both bytes of a word have similar values),
big-endian ids, files of zeros, and files with too few ids.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from train.config.problems import BadInput, Problem
from train.data.tokens import shown

NUM_BLOCKS, BLOCK_BYTES = 64, 2**17
LEAST_WORDS = 128
HIGH = 64  # the upper word of an id is below this, because ids are below 2^22
ALIKE = 0.1  # even and odd words are alike if their shares below HIGH differ by no more than this
APART = 0.9  # the share of lower words that are below HIGH is never above this for ids that exceed 2^16
FIX = "use data.dtype=uint16, uint32, int64 or the type that it was written with"


def dtype_of(path: Path) -> tuple[str, str]:
    """(The name of the type, how it is known). Raises BadInput if there is doubt."""
    size = path.stat().st_size
    words = _sample(path, size)
    if size % 2 or len(words) < LEAST_WORDS:
        if size % 2:
            raise _refused(path, "has an odd number of bytes, so its ids cannot have 2, 4 or 8 bytes")
        raise _refused(path, f"has too few ids ({size:,} bytes) to find out their type")
    return _wide(words, size) or _narrow(path, words)


def _sample(path: Path, size: int) -> np.ndarray:
    """The file as 2-byte words, a multiple of four. Of a large file, blocks that are spread evenly over it."""
    whole = np.memmap(path, dtype=np.uint8, mode="r", shape=(size // 8 * 8,)) if size >= 8 else np.empty(0, np.uint8)
    if size <= NUM_BLOCKS * BLOCK_BYTES:
        return np.array(whole).view("<u2")
    starts = np.linspace(0, size - BLOCK_BYTES, NUM_BLOCKS).astype(np.int64) // 8 * 8
    return np.concatenate([whole[start : start + BLOCK_BYTES] for start in starts.tolist()]).view("<u2")


def _wide(words: np.ndarray, size: int) -> tuple[str, str] | None:
    """int64 or uint32, if the upper words have its pattern."""
    columns = words.reshape(-1, 4)
    second, third, fourth = (columns[:, i] for i in (1, 2, 3))
    if not words.any():
        return None
    if size % 8 == 0 and not third.any() and not fourth.any() and (second < HIGH).all():
        return "int64", "no header; int64, as the upper half of every 8 bytes is 0"
    even, odd = words[0::2], words[1::2]
    if size % 4 or not (odd < HIGH).all():
        return None
    if not odd.any():
        return "uint32", "no header; uint32, as every second 2-byte word is 0"
    if (even < HIGH).mean() <= APART:
        return "uint32", f"no header; uint32, as every second 2-byte word is below {HIGH}"
    return None


def _narrow(path: Path, words: np.ndarray) -> tuple[str, str]:
    """uint16; raises BadInput if the words do not have its pattern."""
    even, odd = words[0::2], words[1::2]
    tolerance = max(ALIKE, 3 / math.sqrt(len(odd)))
    if not words.any():
        raise _refused(path, "has only zeros in the bytes that were read, which fit every type")
    if abs((even < HIGH).mean() - (odd < HIGH).mean()) > tolerance:
        raise _refused(path, "has large and small 2-byte words in turn, but not in the pattern of uint32 or int64")
    first, second = words & 255, words >> 8
    if not second.any():
        return "uint16", "no header; uint16, as every second byte is 0"
    if _distance(first, second) <= 0.05 + 0.6 * math.sqrt(20 / len(words)):
        raise _refused(path, "could hold ids of 1 byte or of 2 bytes, because both bytes of its words are alike")
    if second.mean() > first.mean():
        raise _refused(path, "looks like big-endian uint16, which data=tokens does not read")
    return "uint16", "no header; uint16, as neighbouring 2-byte words are alike and their two bytes are not"


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """The total variation distance between two distributions of bytes, by their upper four bits."""
    counts = [np.bincount(values >> 4, minlength=16) / len(values) for values in (one, other)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2)


def _refused(path: Path, why: str) -> BadInput:
    return BadInput(Problem("token_type", f"data.path={shown(path)} has no header and {why}", FIX))
