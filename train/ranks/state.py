"""The state of a sharded model: full tensors by global name, and the bytes that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from train.config.schema import ModelConfig
from train.model.transformer import Transformer
from train.ranks.gradients import local

# (the parameter's global name, the parameter) -> what the optimiser keeps for it, by its own names
Kept = Callable[[str, nn.Parameter], Mapping[str, object]]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The number of bytes of the local shards."""
    return sum(local(t).numel() * t.element_size() for t in tensors)


def in_memory(value: Tensor) -> list[Tensor]:
    """The tensors that hold an optimiser's state: itself, or the codes and scales of one that is kept in few bits."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [getattr(value, name) for name in names]


def whole(value: Tensor) -> Tensor:
    """An optimiser's state as numbers of its type: itself, or a copy of one that is kept in few bits."""
    return value.dequantize(value.dtype) if is_traceable_wrapper_subclass(value) else value


def full_tensor(x: Tensor) -> Tensor:
    """A DTensor's full value on every rank of its mesh. Collective: an all-reduce over each axis that shards it.

    `DTensor.full_tensor` is not used, because it gathers with a collective that gloo has for CPU tensors only, and that
    crashes with CUDA tensors.
    """
    if not isinstance(x, DTensor):
        return x
    mesh, shard = x.device_mesh, x.to_local()
    shard = shard.to(mesh.device_type)  # it is in the host's memory if it is offloaded
    shape, offset = place_of(x)
    assert shape == tuple(shard.shape)
    full = torch.zeros(x.shape, dtype=x.dtype, device=shard.device)
    full[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))] = shard
    for i, placement in enumerate(x.placements):
        assert not isinstance(placement, Partial), "incomplete tensor"
        if not isinstance(placement, Replicate):
            dist.all_reduce(full, group=mesh.get_group(i))
    return full


def place_of(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(The shape of this rank's part of x, the indices of its first element in the whole x). It uses a private function
    (torch 2.11 to 2.13), because FSDP over tp uses a private placement."""
    if not isinstance(x, DTensor):
        return tuple(x.shape), (0,) * x.ndim
    shape, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    return tuple(shape), tuple(offset)


@dataclass(frozen=True)
class Piece:
    """A tensor that this rank holds between steps: a part of the parameter or buffer `name`, or of a state that the
    optimiser keeps for it. `kind`: "parameter", "buffer", or the state's name in the optimiser, such as exp_avg.
    `shape`: that of the whole tensor. `offset`: the indices of its first element in the whole tensor. Ranks whose
    pieces have the same name, kind, offset and shape hold copies. `copied`: the tensor was made for this piece, and no
    step changes it."""

    name: str
    kind: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    tensor: Tensor
    copied: bool = False

    @property
    def key(self) -> str:
        """Its name in a checkpoint."""
        return f"{self.kind}/{self.name}"

    @property
    def of_optimiser(self) -> bool:
        return self.kind not in ("parameter", "buffer")


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint holds: not those that only count within a step."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}".lstrip("."), buffer


def _nothing(name: str, parameter: nn.Parameter) -> Mapping[str, object]:
    return {}


def pieces_of(parameters: Mapping[str, nn.Parameter], model: nn.Module, kept: Kept = _nothing) -> Iterator[Piece]:
    """What this rank holds between steps: parameters, the model's buffers, and what the optimiser has `kept` for a
    parameter. Nothing is sent."""
    for name, parameter in parameters.items():
        shape, offset = place_of(parameter)
        yield Piece(name, "parameter", tuple(parameter.shape), offset, local(parameter.detach()))
        for kind, value in kept(name, parameter).items():
            if isinstance(value, Tensor) and tuple(value.shape) == shape:
                yield Piece(name, kind, tuple(parameter.shape), offset, whole(value))
            elif isinstance(value, Tensor) and value.ndim == 0:  # the number of its updates
                yield Piece(name, kind, (), (), value)
    for name, buffer in persistent_buffers(model):
        yield Piece(name, "buffer", tuple(buffer.shape), (0,) * buffer.ndim, buffer)


class ShardedState:
    """`parameters`: those of this rank, by global name. `pipeline`: the group whose ranks hold different stages."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimiser: torch.optim.Optimizer,
        pipeline: dist.ProcessGroup,
        config: ModelConfig,
    ) -> None:
        self.parameters, self.optimiser, self.pipeline = parameters, optimiser, pipeline
        self.config = config
        self.gradient_bytes = 0

    def note_gradients(self) -> None:
        """Store the size of the gradients. Call it when they are complete and not yet freed."""
        self.gradient_bytes = num_bytes(p.grad for p in self.parameters.values() if p.grad is not None)

    def state_tensors(self) -> dict[str, Iterable[Tensor]]:
        """The tensors that exist now, by kind. Gradients exist between the backward and the update only."""
        return {
            "parameters": self.parameters.values(),
            "gradients": [p.grad for p in self.parameters.values() if p.grad is not None],
            "optimiser": [
                part
                for state in self.optimiser.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
                for part in in_memory(value)
            ],
        }

    def state_bytes(self) -> dict[str, int]:
        tensors = self.state_tensors()
        return {
            "parameters": num_bytes(tensors["parameters"]),
            "gradients": self.gradient_bytes,
            "optimiser": num_bytes(tensors["optimiser"]),
        }

    def pieces(self, model: nn.Module, kept: Kept) -> Iterator[Piece]:
        """`pieces_of` this rank's parameters."""
        return pieces_of(self.parameters, model, kept)

    def full(self, of: Callable[[nn.Parameter], Tensor | None]) -> Iterator[tuple[str, Tensor]]:
        """The full tensor `of` each parameter of the whole model, in its order, one at a time, on every rank.

        Collective over all axes: every rank must run the iterator to its end. A missing gradient is given as zeros.
        """
        skeleton = Transformer(self.config, param_dtype=torch.float32, compute_dtype=torch.float32)
        for name, shape in ((name, p.shape) for name, p in skeleton.named_parameters()):
            parameter = self.parameters.get(name)
            full = None
            if parameter is not None:
                value = of(parameter)
                full = torch.zeros_like(parameter) if value is None else value
                full = full_tensor(full.detach())
            yield name, self._from_its_stage(full, shape)

    def _from_its_stage(self, full: Tensor | None, shape: torch.Size) -> Tensor:
        if self.pipeline.size() == 1:
            assert full is not None
            return full
        like = next(iter(self.parameters.values()))
        owner = torch.tensor(-1 if full is None else self.pipeline.rank(), device=like.device)
        dist.all_reduce(owner, dist.ReduceOp.MAX, group=self.pipeline)
        # Two stages hold a tied weight. The one that does not send must not receive into its own live tensor: it would
        # mend a copy that has drifted, and nobody would see it.
        if full is None or int(owner) != self.pipeline.rank():
            full = torch.empty(shape, dtype=like.dtype, device=like.device)
        value = full.contiguous()
        dist.broadcast(value, group_src=int(owner), group=self.pipeline)
        return value
