"""Writes the tensors of a checkpoint by torch.distributed.checkpoint (DCP), which plans who writes which part.

A rank gives pieces (`ranks.state.Piece`): plain tensors with their place in a whole tensor. DCP's default planner knows
places only of DTensors, so the planner here says them.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from train.checkpoint.manifest import METADATA, File
from train.checkpoint.reading import chunk_of
from train.ranks.state import Piece


def write_pieces(pieces: Iterable[Piece], folder: Path, group: dist.ProcessGroup, threads: int) -> dict[str, File]:
    """Write the pieces of all ranks to the folder, which exists and is empty, and make sure that the files are on the
    disk. `threads`: the number of this rank's files, which are written at the same time. Returns the files that this
    rank wrote. Collective over the group, which must be able to send from the CPU.

    Raises dcp.CheckpointException on every rank if it fails on one.
    """
    writer, planner = _Writer(folder, threads), _SavePieces({piece.key: piece for piece in pieces})
    dcp.save({}, storage_writer=writer, planner=planner, process_group=group)
    return writer.files


class _SavePieces(DefaultSavePlanner):
    """Plans what this rank writes. Of copies on several ranks DCP writes one."""

    def __init__(self, pieces: dict[str, Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(piece) for piece in self.pieces.values() if piece.tensor.numel() > 0])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].tensor.detach()


def _write_item(piece: Piece) -> WriteItem:
    chunk = chunk_of(piece)
    properties = TensorProperties(dtype=piece.tensor.dtype)
    data = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(piece.shape))
    return WriteItem(MetadataIndex(piece.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class _Hashed:
    """A file that hashes what is written to it, which is what should be read from the disk later."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None  # torch's writer replaces it by an error of its own

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()

    def to_disk(self) -> File:
        """Make sure that the file is on the disk. Returns its size and hash."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return File(self.size, self.digest.hexdigest())


class _Writer(FileSystemWriter):
    """Writes the files of this rank, each in a thread. `files`: their sizes and hashes. DCP's own writer loses an error
    of a second thread, such as a full disk, and would record the path of the folder before the commit."""

    def __init__(self, folder: Path, threads: int) -> None:
        super().__init__(folder, overwrite=False)
        self.folder, self.threads = folder, threads
        self.files: dict[str, File] = {}

    def storage_meta(self) -> None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        shares: list[list[WriteItem]] = [[] for _ in range(self.threads)]
        sizes = [0] * self.threads
        for item in sorted(plan.items, key=lambda item: item.tensor_storage_size() or 0, reverse=True):
            emptiest = sizes.index(min(sizes))
            shares[emptiest].append(item)
            sizes[emptiest] += item.tensor_storage_size() or 0
        names = [f"{plan.storage_data.prefix}{number}.distcp" for number in range(self.threads)]
        with ThreadPoolExecutor(max_workers=self.threads) as pool:
            written = [*pool.map(lambda name, share: self._write_file(name, share, planner), names, shares)]
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result([result for results in written for result in results])
        return future

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        if not items:
            return []
        with (self.folder / name).open("xb") as raw:
            file = _Hashed(raw)
            for item in items:
                start, tensor = file.size, planner.resolve_data(item)
                assert isinstance(tensor, Tensor)
                tensor = tensor.cpu()
                if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size():
                    tensor = tensor.clone()  # a view would be saved with the whole memory that it shares
                try:
                    torch.save(tensor, cast(BinaryIO, file))
                except RuntimeError as error:
                    raise file.error or error from None
                info = _StorageInfo(name, start, file.size - start)
                results.append(WriteResult(item.index, info.length, info))
            self.files[name] = file.to_disk()
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {one.index: one.storage_data for of_rank in results for one in of_rank}
        with (self.folder / METADATA).open("xb") as raw:
            file = _Hashed(raw)
            pickle.dump(metadata, file)
            self.files[METADATA] = file.to_disk()
