"""Which part of a whole tensor a rank has recorded: found from its shape, and where several parts have this shape, from
its values.

Rows follow from the rank's place on the batch axes and the number of the microbatch. The sequence is split over `cp` in
pairs of chunks (`context/apply.py`), and what is left of it may be split over another axis; rows, over `tp`. Any other
dimension may be split over one axis, with one chunk for each rank or, where ranks share a head, for each group of
neighbouring ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from train.config.shapes import chunk
from train.config.strategy import BATCH_AXES
from train.proof.locating.trace import Key, Trace
from train.strategies.context.apply import positions_of


@dataclass(frozen=True)
class Part:
    """`index`: the indices of a part of the whole tensor in each of its dimensions. `axes`: the axes that split it."""

    index: tuple[Tensor, ...]
    axes: tuple[str, ...]

    def same(self, other: Part) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.index, other.index, strict=True))

    def of(self, whole: Tensor) -> Tensor:
        return whole[torch.meshgrid(*self.index, indexing="ij")] if self.index else whole


@dataclass(frozen=True)
class Judged:
    """A piece of one rank with the part of the whole tensor that it is nearest to. `part`: None if no part has its
    shape."""

    rank: int
    key: Key
    piece: Tensor
    part: Part | None
    error: float


@dataclass(frozen=True)
class Sizes:
    """The degree of every axis of the mesh, the length of a sequence, and the degree of expert parallelism, which is no
    axis of the mesh."""

    degrees: dict[str, int]
    seq_len: int
    ep: int = 1

    def split_axes(self) -> list[str]:
        """The axes over which a tensor of one microbatch may be split."""
        return [axis for axis, n in self.degrees.items() if n > 1 and axis not in (*BATCH_AXES, "pp")]


def likely(sizes: Sizes) -> tuple[str, ...]:
    """The axes of the mesh with more than one rank."""
    return tuple(axis for axis, degree in sizes.degrees.items() if degree > 1)


def sequence_dim(name: str) -> int:
    """The dimension of the sequence: 2 of queries, keys, values and what attention gives (BHTE), 1 of all others."""
    return 2 if ".attention.kernel" in name else 1


def whole_shape(name: str, tensor: Tensor, tokens: int) -> Tensor:
    """A dispatch gives a row for each token; all other modules have the sequence as a dimension."""
    return tensor.unflatten(0, (-1, tokens)) if name.endswith(".dispatch") else tensor


def parts(name: str, whole: Tensor, piece: Tensor, key: Key, trace: Trace, sizes: Sizes) -> Iterator[Part]:
    """The parts of the whole tensor that have the piece's shape and that this rank may have."""
    if piece.ndim != whole.ndim:
        return
    choices: list[list[tuple[Tensor, tuple[str, ...]]]] = []
    for dim in range(whole.ndim):
        if dim == 0:
            start = trace.rows[0] + key[1] * trace.micro_batch_size
            rows = torch.arange(start, max(start, min(start + trace.micro_batch_size, trace.rows[1])))
            slices = _slices(len(rows), piece.shape[0], trace.place, sizes)
            choices.append([(rows[index], axes) for index, axes in slices if axes in ((), ("tp",))])
        elif dim == sequence_dim(name):
            choices.append([*_sequences(piece.shape[dim], trace.place, sizes)])
        else:
            choices.append([*_slices(whole.shape[dim], piece.shape[dim], trace.place, sizes)])
    for combination in itertools.product(*choices):
        axes = tuple(axis for _, axes in combination for axis in axes)
        if len(axes) == len(set(axes)):
            yield Part(tuple(index for index, _ in combination), axes)


def _sequences(length: int, place: dict[str, int], sizes: Sizes) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    cp = sizes.degrees["cp"]
    everything, own = torch.arange(sizes.seq_len), positions_of(place["cp"], cp, sizes.seq_len)
    # a context rank's own tokens come first: where values repeat, as in targets, several parts may be equally near
    for positions, axes in (*([(own, ("cp",))] if cp > 1 else []), (everything, ())):
        if len(positions) == length:
            yield positions, axes
        for index, split in _slices(len(positions), length, place, sizes):
            if split and "cp" not in split:
                yield positions[index], (*axes, *split)


def _slices(whole: int, length: int, place: dict[str, int], sizes: Sizes) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    if length == whole:
        yield torch.arange(whole), ()
        return
    for axis in sizes.split_axes():
        degree = sizes.degrees[axis]
        # neighbouring ranks share a piece if there are fewer pieces than ranks
        for pieces in (n for n in range(2, min(degree, whole) + 1) if degree % n == 0):
            indices = chunk(whole, pieces, place[axis] // (degree // pieces))
            if len(indices) == length:
                yield torch.tensor(indices), (axis,)
