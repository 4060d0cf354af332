"""Saves checkpoints during a run: at once, or in a thread after copying the state to the host's memory.

The ranks write their parts together, and then rank 0 commits the folder (`folder.py`). An error of any rank, at any
moment, is the same `SaveFailed` on every rank, and the newest good checkpoint stays as it is. A state with a number
that is not finite is never saved: it is a `SaveFailed` too, or a line if the run ignores such numbers.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from train.checkpoint.folder import Folder
from train.checkpoint.manifest import Damaged, File, Manifest, Stored, wrong_files
from train.checkpoint.reading import name_of
from train.checkpoint.state import all_pieces
from train.checkpoint.writing import write_pieces
from train.config.problems import EXIT_ENVIRONMENT, Reported
from train.config.schema import CheckpointConfig, SaveMode
from train.config.strategy import SavesState
from train.measure.results import GiB, Record
from train.ranks.side_group import SideGroup
from train.ranks.state import Piece

MOST_THREADS = 8  # that write


class SaveFailed(Reported):
    """A checkpoint could not be written."""

    exit_code = EXIT_ENVIRONMENT
    cut_off = True


@dataclass(frozen=True)
class Facts:
    """What a manifest says of the run, the same for all its checkpoints."""

    layout: dict[str, Any]
    versions: dict[str, str]
    work: dict[str, Any]
    config_sha256: str


class Saver:
    """Collective: every rank makes one, and calls the same methods. `side_group`: a group that nothing else uses, as a
    thread may use it. `run`: the run's directory. `ignores_nonfinite`: whether training goes on after a state that is
    not finite, which is then not saved."""

    def __init__(
        self,
        config: CheckpointConfig,
        run: Path,
        facts: Facts,
        train_step: SavesState,
        side_group: SideGroup,
        *,
        ignores_nonfinite: bool = False,
    ) -> None:
        self.ignores_nonfinite = ignores_nonfinite
        self.config, self.run, self.facts, self.train_step, self.side = config, run, facts, train_step, side_group
        self.rank, self.world_size = side_group.world.rank, side_group.world.world_size
        self.folder = Folder(run, config.keep)
        cores = (os.cpu_count() or 1) // side_group.world.local_world_size
        self.threads = min(max(cores, 1), MOST_THREADS)
        self.staging: dict[str, Tensor] = {}  # kept between saves, as new memory costs more time than the copy
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.written: Record = {}
        self.saved_step = 0  # of the newest save that was begun
        self.good_step = 0  # of the newest one that is complete

    def save(self, step: int, *, last: bool) -> Record:
        """Save the state after this step, unless it is saved already. The last save of a run is always complete when
        this returns. Returns what is logged: the time that training waited and, of the newest complete save, its time
        and its speed."""
        started = time.perf_counter()
        self.wait()
        if step != self.saved_step:
            self.saved_step = step
            pieces = [*all_pieces(self.train_step, self.rank)]
            if last or self.config.mode is SaveMode.sync:
                self._write(step, pieces)
            else:
                self.thread = threading.Thread(target=self._in_thread, args=(step, self._copied(pieces)), daemon=True)
                self.thread.start()
        if last:
            self.wait()
        return {"checkpoint/stall_ms": 1e3 * (time.perf_counter() - started), **self.written}

    def wait(self) -> None:
        """Wait until the save that is going on is complete. Raises its error."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _copied(self, pieces: Iterable[Piece]) -> list[Piece]:
        """The pieces with copies of their tensors in the host's memory."""
        copies = []
        for piece in pieces:
            if piece.copied:
                copies.append(piece)
                continue
            tensor, kept = piece.tensor.detach(), self.staging.get(piece.key)
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                pinned = tensor.device.type == "cuda"
                kept = self.staging[piece.key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            kept.copy_(tensor, non_blocking=True)
            copies.append(Piece(piece.name, piece.kind, piece.shape, piece.offset, kept))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return copies

    def _in_thread(self, step: int, pieces: list[Piece]) -> None:
        try:
            self._write(step, pieces)
        except BaseException as error:  # raised in the main thread by `wait`
            self.error = error

    def _write(self, step: int, pieces: list[Piece]) -> None:
        started = time.perf_counter()
        if ranks := self._not_finite(pieces):
            failed = self._failed(step, f"its state has numbers that are not finite, on ranks {ranks}")
            if not self.ignores_nonfinite:
                raise failed
            if self.rank == 0:
                print(failed, file=sys.stderr, flush=True)
            return
        unfinished = Path(self._on_rank_0(step, lambda: self.folder.begin(step)))
        try:
            assert self.side.group is not None
            manifest = self._manifest(step, pieces, write_pieces(pieces, unfinished, self.side.group, self.threads))
            final = Path(self._on_rank_0(step, lambda: self._commit(unfinished, manifest)))
        except (CheckpointException, SaveFailed) as error:
            self._on_rank_0(step, lambda: self.folder.discard(unfinished))
            raise error if isinstance(error, SaveFailed) else self._failed(step, _cause(error)) from error
        wrong = [one for of_rank in self.side.exchange_json(self._wrong(final, manifest)) for one in of_rank]
        if wrong:
            raise self._failed(step, f"what the disk gives back is not what was written: {'; '.join(wrong[:3])}")
        self._on_rank_0(step, lambda: self.folder.accept(final))
        self.good_step = step
        seconds = time.perf_counter() - started
        self.written = {"checkpoint/save_s": seconds, "checkpoint/gib_per_s": manifest.bytes / GiB / seconds}

    def _not_finite(self, pieces: list[Piece]) -> list[int]:
        """The ranks whose state has a number that is not finite, the same list on every rank."""
        good = all_finite([x.tensor for x in pieces if x.tensor.is_floating_point() and x.tensor.numel() > 0])
        return [rank for of_rank in self.side.exchange_json([] if good else [self.rank]) for rank in of_rank]

    def _manifest(self, step: int, pieces: list[Piece], files: dict[str, File]) -> Manifest:
        own = {piece.key: (piece.shape, name_of(piece.tensor.dtype)) for piece in pieces}
        tensors: dict[str, Stored] = {}
        written: dict[str, File] = {}
        for of_rank in self.side.exchange_json([own, {name: asdict(one) for name, one in files.items()}]):
            tensors |= {key: Stored(tuple(shape), dtype) for key, (shape, dtype) in of_rank[0].items()}
            written |= {name: File(**one) for name, one in of_rank[1].items()}
        return Manifest(step, written, dict(sorted(tensors.items())), **vars(self.facts))

    def _commit(self, unfinished: Path, manifest: Manifest) -> Path:
        manifest.write(unfinished)
        final = self.folder.commit(unfinished)
        Manifest.read(final)
        return final

    def _wrong(self, final: Path, manifest: Manifest) -> list[str]:
        return wrong_files(final, manifest, self.rank, self.world_size)

    def _on_rank_0(self, step: int, action: Callable[[], Path | None]) -> str:
        """Do it on rank 0. Returns its result as text on every rank, or raises its error on every rank."""
        outcome: dict[str, str] = {}
        if self.rank == 0:
            try:
                outcome["result"] = str(action())
            except OSError as error:
                outcome["error"] = error.strerror or str(error)
            except Damaged as error:
                outcome["error"] = error.why
        outcome = self.side.share_json(outcome)
        if "error" in outcome:
            raise self._failed(step, outcome["error"])
        return outcome["result"]

    def _failed(self, step: int, why: str) -> SaveFailed:
        """The error, with the newest good checkpoint."""
        good = None
        with suppress(OSError):
            good = (self.folder.path / "latest").read_text().strip()
        kept = f"the newest good one is {self.folder.path / good}" if good else "there is no older one"
        return SaveFailed(f"the checkpoint of step {step} was not saved: {why}; {kept}")


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number of these tensors is finite; none of them is empty."""

    def finite(figures: Sequence[Tensor]) -> bool:
        return not figures or bool(torch.stack([figure.double().cpu() for figure in figures]).isfinite().all())

    # A sum is found several times as fast as the largest magnitude, but it can overflow.
    return finite([tensor.sum() for tensor in tensors]) or finite(torch._foreach_norm(tensors, float("inf")))


def _cause(error: CheckpointException) -> str:
    """The first error of a rank, in words."""
    rank, (cause, _) = next(iter(error.failures.items()))
    inner: BaseException | None = cause
    while inner is not None and not isinstance(inner, OSError | Damaged):
        inner = inner.__cause__ or inner.__context__
    text = (inner.strerror if isinstance(inner, OSError) else None) or str(cause)
    return f"rank {rank}: {text}"
