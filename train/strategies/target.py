"""The object that techniques are applied to, for the lab's own engines and for DeepSpeed's."""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed.device_mesh import DeviceMesh

from train.config.schema import Config
from train.config.strategy import LOSS_AXES, MESH_AXES
from train.config.technique import Target
from train.model.transformer import Transformer
from train.model.weights import derived_seed, materialise
from train.ranks.distributed import own_device


def new_target(
    model: Transformer, mesh: DeviceMesh, config: Config, meshes: dict[str, DeviceMesh | None] | None = None
) -> Target:
    """A model on the meta device as the target of techniques. `meshes`: those that all stages of a rank share."""
    device = own_device(mesh)
    model.rope = model.rope.to(device)
    fill = partial(materialise, config=config.model, seed=config.train.seed, device=device)
    return Target(model, mesh, config, model, fill, {} if meshes is None else meshes, {*LOSS_AXES})


def seed_dropout(mesh: DeviceMesh, config: Config, apart: set[str]) -> None:
    """Seed the dropout masks. Ranks that differ on an axis in `apart` have different tokens or layers, and draw
    different masks. Ranks with the same tokens, as in tp without sequence parallelism, draw the same masks."""
    place = [mesh[axis].get_local_rank() if axis in apart else 0 for axis in MESH_AXES]
    torch.manual_seed(derived_seed(config.train.seed, "dropout", *place))
