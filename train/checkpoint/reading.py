"""Reads the tensors of a checkpoint by torch.distributed.checkpoint (DCP), whose resharding it uses.

DCP itself opens a checkpoint with `pickle`, which runs any code that a foreign file contains. Here its `.metadata` is
read by an unpickler that knows nothing but DCP's own data classes, and tensors by torch's loader of plain tensors.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from train.checkpoint.manifest import DTYPES, METADATA, Damaged, Manifest
from train.ranks.state import Piece

# What DCP writes into `.metadata`, as far as it describes plain tensors. A name that is not here is not looked up.
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", *DTYPES},
    "torch.serialization": {"_get_layout"},
}


def read_pieces(pieces: Iterable[Piece], folder: Path, manifest: Manifest) -> None:
    """Fill the tensors of the pieces from a checkpoint whose files have been compared with their hashes. Each rank
    reads on its own. Raises Damaged."""
    reader, planner = FileSystemReader(folder), _LoadPieces({piece.key: piece for piece in pieces})
    metadata = read_metadata(folder, manifest)
    reader.set_up_storage_reader(metadata, True)
    planner.set_up_planner({}, metadata, True)
    try:
        reader.read_data(planner.create_local_plan(), planner).wait()
    except (OSError, ValueError, RuntimeError, LookupError, AssertionError, pickle.UnpicklingError) as error:
        raise Damaged(folder, f"a tensor cannot be read ({error})") from error


class _LoadPieces(DefaultLoadPlanner):
    """Plans what this rank reads: its part of each tensor, from all saved parts that overlap with it."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for key, piece in self.pieces.items():
            stored = self.metadata.state_dict_metadata[key]
            assert isinstance(stored, TensorStorageMetadata)
            if piece.tensor.numel() > 0:
                items += create_read_items_for_chunk_list(key, stored, [chunk_of(piece)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor.detach()


def chunk_of(piece: Piece) -> ChunkStorageMetadata:
    """The place of the piece in its whole tensor."""
    return ChunkStorageMetadata(torch.Size(piece.offset), piece.tensor.shape)


def _member(kind: Any, name: str) -> Any:
    """What getattr may be used for: Python 3.11.0 to 3.11.3 pickle a member of an enumeration by its name."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it takes {name} of {kind!r}")
    return kind[name]


class _OnlyMetadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(folder: Path, manifest: Manifest) -> Metadata:
    """DCP's `.metadata`, compared with the manifest. Raises Damaged if it contains anything but descriptions of the
    manifest's tensors in the manifest's files."""
    try:
        with (folder / METADATA).open("rb") as file:
            metadata = _OnlyMetadata(file).load()
        _compare(metadata, manifest)
    except OSError as error:
        raise Damaged(folder, f"{METADATA} cannot be read ({error.strerror})") from error
    except Exception as error:  # a foreign pickle can raise whatever it likes
        raise Damaged(folder, f"{METADATA} is not the metadata of this checkpoint ({error})") from error
    assert isinstance(metadata, Metadata)
    return metadata


def _compare(metadata: Any, manifest: Manifest) -> None:
    """Raise ValueError if the metadata does not describe the manifest's tensors, in the manifest's files."""
    if not isinstance(metadata, Metadata) or set(metadata.state_dict_metadata) != set(manifest.tensors):
        raise ValueError("it has other tensors than the manifest")
    for key, stored in metadata.state_dict_metadata.items():
        one = manifest.tensors[key]
        if not isinstance(stored, TensorStorageMetadata) or (tuple(stored.size), name_of(stored.properties.dtype)) != (
            one.shape,
            one.dtype,
        ):
            raise ValueError(f"{key} is not {one}")
        if not fills(stored.chunks, one.shape):
            raise ValueError(f"the parts of {key} do not make a whole")
        if any(MetadataIndex(key, chunk.offsets) not in metadata.storage_data for chunk in stored.chunks):
            raise ValueError(f"parts of {key} are in no file")
    for info in metadata.storage_data.values():
        if info.relative_path not in manifest.files or getattr(info, "transform_descriptors", None):
            raise ValueError("a tensor is in another file than those of the manifest")


def fills(chunks: list[ChunkStorageMetadata], shape: tuple[int, ...]) -> bool:
    """Whether the chunks lie inside a tensor of this shape, do not overlap, and are all of it."""
    boxes = [[*zip(chunk.offsets, chunk.sizes, strict=True)] for chunk in chunks]
    if any(len(box) != len(shape) for box in boxes):
        return False
    if any(
        start < 0 or size < 0 or start + size > n for box in boxes for (start, size), n in zip(box, shape, strict=True)
    ):
        return False
    boxes.sort()
    for i, first in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if shape and other[0][0] >= first[0][0] + first[0][1]:
                break  # this one and all later ones begin behind it
            if all(a < b + m and b < a + n for (a, n), (b, m) in zip(first, other, strict=True)):
                return False
    return sum(math.prod(size for _, size in box) for box in boxes) == math.prod(shape)


def name_of(dtype: torch.dtype) -> str:
    """torch's name of a type, as `float32`."""
    return str(dtype).removeprefix("torch.")
