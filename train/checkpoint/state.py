"""The whole state of a run on a rank, as pieces: what every layout shares, and what only the same layout can read.

parameter/layers.0.attention.wq.weight   shared: parameters, buffers, and the optimiser's state, by global names
rank_3/random/cpu                        of rank 3 alone: random state, and the state of communication hooks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.manifest import Damaged, Manifest, Stored
from train.checkpoint.reading import name_of, read_pieces
from train.config.schema import Config
from train.config.strategy import SavesState, resolve_degrees
from train.model.transformer import Transformer
from train.model.weights import derived_seed
from train.ranks.state import Piece


def all_pieces(train_step: SavesState, rank: int) -> Iterator[Piece]:
    """What this rank gives to a checkpoint. Collective."""
    yield from train_step.saved()
    for name, tensor in {**_random_state(), **train_step.own_state()}.items():
        yield _own(rank, name, tensor)


def layout(config: Config, world_size: int, device: str) -> dict[str, Any]:
    """What must be equal so that a rank can read what only it had. `device`: the type of the ranks' devices."""
    keys = {name: value for name, value in dataclasses.asdict(config.strategy).items() if name != "name"}
    degrees = resolve_degrees(config.strategy.mesh_axes(), world_size)
    return {"strategy": keys | degrees, "world_size": world_size, "device": device}


def restore(train_step: SavesState, folder: Path, manifest: Manifest, config: Config, *, rank: int, same: bool) -> None:
    """Fill the state from a verified checkpoint. `same`: whether it was saved on the same layout. On another, random
    state is drawn anew from the seed and the step, and hooks start anew. Collective. Raises BadInput."""
    _check_names(folder, manifest, config)

    def read(pieces: Iterable[Piece]) -> None:
        wanted = [*pieces]
        for piece in wanted:
            _check_piece(folder, piece, manifest.tensors.get(piece.key))
        read_pieces(wanted, folder, manifest)

    train_step.restore(read, manifest.tensors.keys())
    own: dict[str, Tensor] = {}
    if same:
        head = f"rank_{rank}/"
        stored = {key.removeprefix(head): one for key, one in manifest.tensors.items() if key.startswith(head)}
        own = {name: torch.empty(one.shape, dtype=getattr(torch, one.dtype)) for name, one in stored.items()}
        read_pieces([_own(rank, name, tensor) for name, tensor in own.items()], folder, manifest)
    train_step.load_own_state({name: x for name, x in own.items() if not name.startswith("random/")})
    if same:
        _set_random_state(folder, own)
    else:
        torch.manual_seed(derived_seed(torch.initial_seed(), "resumed", manifest.step))


def _own(rank: int, name: str, tensor: Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(name, f"rank_{rank}", shape, (0,) * tensor.ndim, tensor)


def _random_state() -> dict[str, Tensor]:
    """The state of torch's generators, by the type of device. The lab uses no other random numbers in training."""
    found = {"random/cpu": torch.get_rng_state()}
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        found[f"random/{accelerator.type}"] = torch.get_device_module(accelerator).get_rng_state()
    return found


def _set_random_state(folder: Path, states: dict[str, Tensor]) -> None:
    for name in _random_state().keys() & states.keys():  # a run on the CPU needs no state of the machine's GPU
        device = name.removeprefix("random/")
        set_state = torch.set_rng_state if device == "cpu" else torch.get_device_module(device).set_rng_state
        try:
            set_state(states[name])
        except (RuntimeError, TypeError) as error:
            raise Damaged(folder, f"its {name} is not the state of a generator of this torch") from error


def _check_names(folder: Path, manifest: Manifest, config: Config) -> None:
    """Raise Damaged if the checkpoint's parameters are not those of the model."""
    if why := other_parameter({key: one.shape for key, one in manifest.tensors.items()}, config):
        raise Damaged(folder, why)


def other_parameter(shapes: Mapping[str, tuple[int, ...]], config: Config) -> str:
    """The first parameter among these `shapes`, by key, that is not as in the model, in words; empty if all are."""
    skeleton = Transformer(config.model, param_dtype=torch.float32, compute_dtype=torch.float32)
    expected = {f"parameter/{name}": tuple(p.shape) for name, p in skeleton.named_parameters()}
    found = {key: shape for key, shape in shapes.items() if key.startswith("parameter/")}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            name, here, there = key.removeprefix("parameter/"), expected.get(key), found.get(key)
            words = [f"{list(shape)}" if shape is not None else "missing" for shape in (there, here)]
            return f"its parameter {name} is {words[0]}, but in this model it is {words[1]}"
    return ""


def _check_piece(folder: Path, piece: Piece, stored: Stored | None) -> None:
    here = Stored(piece.shape, name_of(piece.tensor.dtype))
    if here != stored:
        raise Damaged(folder, f"its {piece.key} is {stored or 'missing'}, but in this run it is {here}")
