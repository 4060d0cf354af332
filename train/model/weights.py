"""Initial weights as a pure function of (seed, parameter name), so that every layout starts from identical values.

Each logical matrix is drawn whole, on the CPU, in float32, from its own generator; a rank then keeps its part. This
needs no communication and no seed checkpoint, and on the host never more memory than one matrix.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.config.schema import ModelConfig


def derived_seed(*parts: object) -> int:
    """A 63-bit seed from any values, the same on every platform."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def initial_value(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """The whole initial value of the parameter with this global name: float32, on the CPU.

    Norms are ones. Matrices are normally distributed with standard deviation `init_scale` / sqrt(columns), so that the
    size of their output does not depend on the width (LeCun et al. 1998). Matrices that write to the residual stream
    are smaller by sqrt(2 x layers) (Radford et al. 2019). Each expert's matrix has its own generator.
    """
    if len(shape) == 1:
        return torch.ones(shape)
    residual = name.endswith(("attention.wo.weight", "down.weight", "experts.down"))
    std = config.init_scale / math.sqrt(shape[-1] * (2 * config.num_layers if residual else 1))
    value = torch.empty(shape)
    if len(shape) == 3:
        for expert, matrix in enumerate(value):
            matrix.normal_(0.0, std, generator=_generator(seed, name, expert))
        return value
    return value.normal_(0.0, std, generator=_generator(seed, name))


def _generator(*parts: object) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(derived_seed(*parts))


def global_name(name: str, config: ModelConfig) -> str:
    """The name that a weight has in the whole model. A tied head on a stage without the embedding is a copy of the
    embedding's weight and has its name."""
    return "embed.weight" if config.tie_embeddings and name == "head.weight" else name


def global_parameters(model: nn.Module, config: ModelConfig) -> dict[str, nn.Parameter]:
    """The model's parameters by global name, each once. Of two copies of a tied weight, the embedding's is given."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(global_name(name, config), parameter)
    return found


def materialise(module: nn.Module, prefix: str, config: ModelConfig, *, seed: int, device: torch.device) -> None:
    """Give the module's meta parameters memory on `device` and their initial values, sharded as they are declared.
    Buffers are filled with zeros.

    `prefix` is the module's own global name with its final dot ("layers.3."), or "". Parameters that already have
    memory do not change, so that a model can be materialised and sharded block by block.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one parameter
    for path, old in list(module.named_parameters(remove_duplicate=False)):
        if not old.is_meta:
            continue
        if old not in made:
            name = global_name(prefix + path, config)
            value = initial_value(name, old.shape, config, seed).to(device, old.dtype)
            if isinstance(old, DTensor):  # src_data_rank=None: every rank has the whole value, so nothing is sent
                value = distribute_tensor(value, old.device_mesh, old.placements, src_data_rank=None)
            made[old] = nn.Parameter(value, requires_grad=old.requires_grad)
        owner, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(owner), leaf, made[old])
    for path, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = path.rpartition(".")
            setattr(module.get_submodule(owner), leaf, torch.zeros_like(buffer, device=device))
