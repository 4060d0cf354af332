"""Whole tensors of a checkpoint, in one process without ranks: to compare two checkpoints, and to export one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from train.checkpoint.manifest import Manifest
from train.checkpoint.reading import read_pieces
from train.ranks.state import Piece


def whole_tensor(folder: Path, manifest: Manifest, key: str) -> Tensor:
    """The tensor with this key, in the host's memory. Raises Damaged."""
    stored = manifest.tensors[key]
    kind, _, name = key.partition("/")
    value = torch.empty(stored.shape, dtype=getattr(torch, stored.dtype))
    read_pieces([Piece(name, kind, stored.shape, (0,) * len(stored.shape), value)], folder, manifest)
    return value


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in two checkpoints. `why`: how it differs, in words. `error`: max|a-b| / max|b|, or
    None if the two cannot be compared."""

    key: str
    why: str
    error: float | None = None


def differences(first: Path, second: Path) -> Iterator[Difference]:
    """Every tensor that is not bitwise equal in both checkpoints, without what only one layout can read. Raises
    Damaged."""
    a, b = Manifest.read(first), Manifest.read(second)
    shared = sorted(key for key in a.tensors.keys() | b.tensors.keys() if not key.startswith("rank_"))
    for key in shared:
        one, other = a.tensors.get(key), b.tensors.get(key)
        if one is None or other is None:
            yield Difference(key, f"only in the {'second' if one is None else 'first'}")
        elif one != other:
            yield Difference(key, f"{one} in the first, {other} in the second")
        else:
            x, y = whole_tensor(first, a, key), whole_tensor(second, b, key)
            if not torch.equal(x.view(-1).view(torch.uint8), y.view(-1).view(torch.uint8)):
                yield Difference(key, "", _error(x.double(), y.double()))


def _error(x: Tensor, y: Tensor) -> float:
    apart, largest = float((x - y).abs().max()), float(y.abs().max())
    return apart / largest if largest else float("inf") if apart else 0.0
