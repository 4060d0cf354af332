"""What type the ids of a file without a header have: told by their bytes with certainty, or refused.

Seen as little-endian 2-byte words and their bytes, ids of a real vocabulary (below 2^22) look like this:

    int64         of four words the third and the fourth are 0, and the second is below 64
    uint32        every second word is below 64, while the words between are not, or are not all 0
    uint16        both halves of the words are alike; the second byte of a word is smaller than the first, on the mean

Everything else is refused with the fix, data.dtype: ids of one byte (the two bytes of a word are alike), big-endian
ids, files of zeros, and files of too few ids.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from train.config.problems import BadInput, Problem
from train.data.tokens import shown

NUM_BLOCKS, BLOCK_BYTES = 64, 2**17
LEAST_WORDS = 128
HIGH = 64  # a high word is below this, as ids are below 2^22
ALIKE = 0.1  # difference of shares below which two halves are alike, for many words
APART = 0.9  # share of low words below HIGH that ids above 2^16 never reach
FIX = "use data.dtype=uint16, uint32, int64 or what it was written with"


def dtype_of(path: Path) -> tuple[str, str]:
    """(The name of the type, how it is known). Raises BadInput where it is not known for certain."""
    size = path.stat().st_size
    words = _sample(path, size)
    if size % 2 or len(words) < LEAST_WORDS:
        why = "has an odd number of bytes" if size % 2 else f"has too few ids ({size:,} bytes)"
        raise _refused(path, f"{why} to tell the type of its ids")
    found = _wide(words, size) or _narrow(path, words)
    return found


def _sample(path: Path, size: int) -> np.ndarray:
    """The file as 2-byte words, four at a time; of a large file, blocks from the first to the last."""
    whole = np.memmap(path, dtype=np.uint8, mode="r", shape=(size // 8 * 8,)) if size >= 8 else np.empty(0, np.uint8)
    if size <= NUM_BLOCKS * BLOCK_BYTES:
        return np.array(whole).view("<u2")
    starts = np.linspace(0, size - BLOCK_BYTES, NUM_BLOCKS).astype(np.int64) // 8 * 8
    return np.concatenate([whole[start : start + BLOCK_BYTES] for start in starts.tolist()]).view("<u2")


def _wide(words: np.ndarray, size: int) -> tuple[str, str] | None:
    """int64 or uint32, if the high words say so."""
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
    """uint16, if nothing else fits."""
    even, odd = words[0::2], words[1::2]
    tolerance = max(ALIKE, 3 / math.sqrt(len(odd)))
    if not words.any():
        raise _refused(path, "is all zeros where it was looked at, which any type may be")
    if abs((even < HIGH).mean() - (odd < HIGH).mean()) > tolerance:
        raise _refused(path, "has 2-byte words that are large and small in turn, but not as uint32 or int64 has them")
    first, second = words & 255, words >> 8
    if not second.any():
        return "uint16", "no header; uint16, as every second byte is 0"
    if _distance(first, second) <= 0.05 + 0.6 * math.sqrt(20 / len(words)):
        raise _refused(path, "may hold ids of 1 or 2 bytes: both bytes of its words are alike")
    if second.mean() > first.mean():
        raise _refused(path, "looks like big-endian uint16, which data=tokens does not read")
    return "uint16", "no header; uint16, as neighbouring 2-byte words are alike and their two bytes are not"


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Total variation between two distributions of bytes, by their upper four bits."""
    counts = [np.bincount(values >> 4, minlength=16) / len(values) for values in (one, other)]
    return float(np.abs(counts[0] - counts[1]).sum() / 2)


def _refused(path: Path, why: str) -> BadInput:
    return BadInput(Problem("token_type", f"data.path={shown(path)} has no header and {why}", FIX))
