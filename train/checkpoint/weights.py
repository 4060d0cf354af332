"""Initial parameters from a run, one of its checkpoints or a file, instead of drawn ones (`checkpoint.weights`).

They are read by global names, each rank only its own part, so that every strategy starts from the same values. Numbers
of another type are converted. The optimiser is new, and nothing else of the source counts: text, batch and layout are
those of the new run.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from train.checkpoint.manifest import BLOCK, MANIFEST, Manifest
from train.checkpoint.reading import read_pieces
from train.checkpoint.state import other_parameter
from train.checkpoint.whole.newest import newest
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config
from train.config.strategy import SavesState
from train.ranks.side_group import SideGroup
from train.ranks.state import Piece

WEIGHTS = "weights.safetensors"
FIX = f"use the directory of a run, one of its checkpoints/step-N, or a folder with {WEIGHTS}"


def find_weights(config: Config, side_group: SideGroup) -> Weights | None:
    """`open_weights` by rank 0, for all ranks. Collective. Raises BadInput, on rank 0 alone if it cannot be opened."""
    if config.checkpoint.weights is None:
        return None
    # an error ends rank 0, and torchrun ends the others
    opened = open_weights(config) if side_group.world.rank == 0 else None
    found = side_group.share_json(None if opened is None else [str(opened.folder), opened.sha256])
    return Weights(Path(found[0]), found[1])


def open_weights(config: Config) -> Weights | None:
    """The source that `checkpoint.weights` names, which is compared with its hashes; None without one. Raises BadInput
    if it is missing or damaged, or of another model."""
    path = config.checkpoint.weights
    if path is None:
        return None
    folder = Path(path).expanduser()
    if not (folder / WEIGHTS).is_file():
        folder = _checkpoint(folder, path)
    weights = Weights(folder, sha256_of(folder))
    if why := other_parameter(weights.shapes, config):
        message = f"checkpoint.weights={path} is of another model: {why}"
        raise BadInput(Problem("weights", message, "use the weights of a model with these sizes"))
    return weights


def _checkpoint(folder: Path, path: str) -> Path:
    try:
        return newest(folder)
    except BadInput as error:
        said = "; ".join(problem.message for problem in error.problems)
        raise BadInput(Problem("weights", f"checkpoint.weights={path} cannot be used: {said}", FIX)) from error


def sha256_of(folder: Path) -> str:
    """The hash of weights.safetensors, or of a checkpoint's manifest, which has the hashes of its files."""
    digest = hashlib.sha256()
    path = folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / MANIFEST
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Weights:
    """`folder`: a checkpoint, or a folder with weights.safetensors. `sha256`: of `sha256_of`."""

    folder: Path
    sha256: str

    @cached_property
    def manifest(self) -> Manifest | None:
        """That of a checkpoint; None for a file. Raises Damaged."""
        return None if (self.folder / WEIGHTS).is_file() else Manifest.read(self.folder)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every parameter and buffer, by key. Raises BadInput if the file cannot be read."""
        if self.manifest is not None:
            return {key: one.shape for key, one in self.manifest.tensors.items() if _is_weight(key)}
        with opened_file(self.folder / WEIGHTS) as file:
            return {key_of(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def fill(self, train_step: SavesState) -> None:
        """Fill the parameters and buffers of a step that has not begun. Collective. Raises BadInput."""
        train_step.restore(self._read, self.shapes.keys())
        train_step.load_own_state({})

    @torch.no_grad()
    def _read(self, pieces: Iterable[Piece]) -> None:
        """A buffer that the source does not have stays as it is."""
        wanted = [piece for piece in pieces if piece.key in self.shapes and piece.tensor.numel() > 0]
        if self.manifest is not None:
            read_pieces(wanted, self.folder, self.manifest)
            return
        with opened_file(self.folder / WEIGHTS) as file:
            for piece in wanted:
                ends = zip(piece.offset, piece.tensor.shape, strict=True)
                part = file.get_slice(piece.name)[tuple(slice(start, start + size) for start, size in ends)]
                piece.tensor.copy_(part)


def _is_weight(key: str) -> bool:
    return key.startswith(("parameter/", "buffer/"))


def key_of(name: str) -> str:
    """The key in a checkpoint of a tensor of the file. The only buffers that a model keeps are the routers' biases."""
    return f"{'buffer' if name.endswith('router.bias') else 'parameter'}/{name}"


def opened_file(path: Path) -> Any:
    """The open file, as a context. Raises BadInput if it cannot be read, or safetensors is not installed."""
    if importlib.util.find_spec("safetensors") is None:
        message, fix = f"{path} needs safetensors, which is not installed", 'pip install "strategy-lab[compress]"'
        raise BadInput(Problem("extra", message, fix, exit_code=EXIT_ENVIRONMENT))
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise BadInput(Problem("weights", f"{path} cannot be read ({error})", "use a file of safetensors")) from error
