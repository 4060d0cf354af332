"""Whether ranks that hold a copy of the same weight, moment or buffer hold the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from train.config.strategy import MESH_AXES
from train.proof.apart import separating_axes
from train.ranks.state import Piece

NO_COPIES = "(no rank holds a copy)"


def replica_errors(pieces: Iterable[Piece], mesh: DeviceMesh) -> dict[str, Tensor]:
    """For every tensor of which ranks hold copies: max|a-b| / max|b| between the first copy and the others, 0 if all
    are bitwise equal. The name of a tensor that differs says which ranks differ, and along which axes of the mesh.

    Collective over the world: each rank sends a digest of each of its tensors; only where digests differ are the
    tensors sent.
    """
    own = {f"{piece.name} {piece.kind} {list(piece.offset)} {list(piece.tensor.shape)}": piece for piece in pieces}
    digests = gather_json({key: _digest(piece.tensor) for key, piece in own.items()}, mesh)
    holders: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(digests):
        for key in of_rank:
            holders.setdefault(key, []).append(rank)
    errors: dict[str, Tensor] = {}
    for key, ranks in holders.items():
        if len(ranks) == 1:
            continue
        name = " ".join(key.split()[:2])
        if len({digests[rank][key] for rank in ranks}) == 1:
            errors.setdefault(name, torch.zeros((), dtype=torch.float64))
            continue
        others = [rank for rank in ranks if digests[rank][key] != digests[ranks[0]][key]]
        shape = json.loads(key[key.rindex("[") :])
        error = _largest_error(own[key].tensor if key in own else None, shape, ranks, mesh)
        errors[f"{name} on ranks {ranks[0]} and {', '.join(map(str, others))} {_axes(mesh, ranks, others)}"] = error
    return errors or {NO_COPIES: torch.zeros((), dtype=torch.float64)}


def _digest(tensor: Tensor) -> str:
    data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.data, digest_size=16).hexdigest()


def _largest_error(tensor: Tensor | None, shape: list[int], ranks: list[int], mesh: DeviceMesh) -> Tensor:
    """max|a-b| / max|b| between the copy of the first of the ranks and the others; infinite if it cannot be computed,
    as with NaN. Every rank of the world calls it, with its copy or with None: a broadcast, and a maximum."""
    device = torch.device(mesh.device_type)
    own = torch.zeros(shape, dtype=torch.float64) if tensor is None else tensor.detach().double()
    first = own.to(device, copy=True)
    dist.broadcast(first, src=ranks[0])
    apart = (own.to(device) - first).abs().max() if tensor is not None else torch.zeros((), dtype=torch.float64)
    apart = torch.where(apart.isfinite(), apart, torch.inf).to(device)
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    error = (apart / first.abs().max()).cpu()
    return torch.where(error.isfinite(), error, torch.inf) if float(apart) else error.new_zeros(())


def _axes(mesh: DeviceMesh, ranks: list[int], others: list[int]) -> str:
    """The axes along which the first rank differs from the ranks whose copies differ."""
    places = {rank: dict(zip(MESH_AXES, (mesh.mesh == rank).nonzero()[0].tolist(), strict=True)) for rank in ranks}
    pairs = ((places[a], places[b]) for a, b in combinations(ranks, 2) if (a in others) != (b in others))
    return f"({', '.join(sorted(separating_axes(pairs)))})"


def gather_json(value: object, mesh: DeviceMesh) -> list[Any]:
    """The values of all ranks, in the order of ranks. Collective over the world."""
    data = json.dumps(value).encode()
    device = torch.device(mesh.device_type)
    sizes = [torch.zeros((), dtype=torch.long, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor(len(data), device=device))
    longest = max(int(size) for size in sizes)
    message = torch.zeros(longest, dtype=torch.uint8)
    message[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    parts = [torch.zeros(longest, dtype=torch.uint8, device=device) for _ in sizes]
    dist.all_gather(parts, message.to(device))
    return [json.loads(bytes(p[: int(n)].tolist())) for p, n in zip(parts, sizes, strict=True)]
