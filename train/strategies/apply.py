"""Applies techniques to a model, or to one stage of a pipeline: a loop over `techniques.py`."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from train.config.plan import Plan
from train.config.schema import Config
from train.model.transformer import Transformer
from train.strategies.target import new_target, seed_dropout
from train.strategies.techniques import used


def apply_techniques(
    model: Transformer, mesh: DeviceMesh, config: Config, meshes: dict[str, DeviceMesh | None] | None = None
) -> nn.Module:
    """Apply the techniques that the strategy uses, and give the weights memory. Returns the module to call, which may
    wrap the model. `meshes`: those that all stages of a rank share."""
    target = new_target(model, mesh, config, meshes)
    for technique in used(Plan(config, mesh.size())):
        if technique.apply is not None:
            technique.apply(target)
    target.fill_once()
    seed_dropout(mesh, config, target.mask_axes)
    return target.wrapped
