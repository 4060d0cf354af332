"""What a step sends: the number of calls and the bytes of every collective, by mesh axis.

    with Ledger(mesh) as ledger:
        train_step(tokens, targets, lr=lr)
    ledger.totals  # {("tp", "all_gather"): Total(calls=34, bytes=…), …}

Bytes are the size of this rank's message by the convention of nccl-tests: all_gather and reduce_scatter count the
unsharded tensor; all_reduce, broadcast and send count the tensor; all_to_all counts its input. A receive is counted by
its sender. Groups of one rank send nothing and are left out.

The ledger is a dispatch mode: it sees each operator before it runs, also those of DDP's reducer and of autograd's
threads. It slows down an eager step and makes compiled blocks run eagerly. So it is used in warm-up and in recorded
steps, and never in a step whose time is measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.config.traffic import LAB, Total
from train.measure.results import MiB
from train.model.spans import span
from train.ranks.collectives import group_named

# operator -> (its name in the ledger, which argument is the message); for torch 2.11 to 2.13
_C10D = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "gather_": ("gather", 1),
    "scatter_": ("scatter", 0),
    "send": ("send", 0),
}
_FUNCTIONAL = {
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_reduce_coalesced_": "all_reduce",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_out": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "broadcast_": "broadcast",
    "all_gather": "all_gather",  # library strategy_lab: the gather on gloo in train/ranks/collectives.py
    "reduce_scatter": "reduce_scatter",
}
_FUNCTIONAL_LIBRARIES = ("_c10d_functional", "strategy_lab")
REDUCTIONS = {"sum", "avg", "max", "min", "product"}  # the other words among a functional operator's arguments
PARTS = ("ep", "efsdp", "kv_shard", "kv_replicate")  # axes that are not in the mesh; their groups have these names
_SILENT = {"barrier", "monitored_barrier_", "recv_", "recv_any_source_", "wait_tensor", "_wrap_tensor_autograd"}


class Ledger(TorchDispatchMode):
    """Counts inside its `with` block. It sends nothing, so all ranks or only some may use it."""

    def __init__(self, mesh: DeviceMesh, *, named: bool = False) -> None:
        """`named`: also make every operator a region of the profile, named `lab:comm axis op bytes`."""
        super().__init__()
        self.mesh, self.named = mesh, named
        self.totals: dict[tuple[str, str], Total] = {}
        self._axes: dict[str, str] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the DTensor unwraps itself, and then each of its collectives comes here
        library, _, name = func._schema.name.partition("::")
        region: AbstractContextManager[Any] = nullcontext()
        if library == "c10d" and name not in _SILENT:
            op, message = _C10D.get(name, (name, 0))  # an unknown operator is counted under its own name
            region = self._note(op, next(_groups(args)), sum(map(_num_bytes, _tensors(args[message]))))
        elif library in _FUNCTIONAL_LIBRARIES and name not in _SILENT:
            op = _FUNCTIONAL.get(name, name)
            group = next(_groups(reversed(args)))
            whole = group.size() if op == "all_gather" else 1
            region = self._note(op, group, whole * sum(map(_num_bytes, _tensors(args[0]))))
        with region:
            return func(*args, **(kwargs or {}))

    def _note(self, op: str, group: dist.ProcessGroup, num_bytes: int) -> AbstractContextManager[Any]:
        """Count one operator. Returns its region."""
        if group.size() == 1:
            return nullcontext()
        if group.group_name not in self._axes:
            self._axes[group.group_name] = axis_of(group, self.mesh)
        key = (self._axes[group.group_name], op)
        self.totals[key] = self.totals.get(key, Total(0, 0)) + Total(1, num_bytes)
        return span("comm", *key, num_bytes) if self.named else nullcontext()

    def values(self) -> dict[str, float]:
        """The totals under the tags of the metrics: `comm/<axis>/<op>_mib` and `comm/<axis>/<op>_calls`."""
        tags: dict[str, float] = {}
        for (axis, op), total in sorted(self.totals.items()):
            tags[f"comm/{axis}/{op}_mib"] = total.bytes / MiB
            tags[f"comm/{axis}/{op}_calls"] = float(total.calls)
        return tags


def axis_of(group: dist.ProcessGroup, mesh: DeviceMesh) -> str:
    """The mesh axes along which the ranks of the group differ, joined by dots, the outer axis first; `lab` for the
    group with which the lab gathers its measurements."""
    description = group.group_desc
    if description == LAB:
        return LAB
    if (name := description.removeprefix("mesh_")) in PARTS:
        return name
    assert mesh.mesh_dim_names is not None
    ranks = dist.get_process_group_ranks(group)
    places = torch.stack([(mesh.mesh == rank).nonzero()[0] for rank in ranks])
    varying = [i for i in range(mesh.ndim) if places[:, i].unique().numel() > 1]
    size = 1
    for i in varying:
        size *= mesh.size(i)
    if size != len(ranks):
        return "ranks_" + "_".join(map(str, ranks))
    return ".".join(mesh.mesh_dim_names[i] for i in varying)


def axis_size(axis: str, mesh: DeviceMesh) -> int | None:
    """The number of ranks in a group named by `axis_of`; None if it is not made of mesh axes, for example `ep`."""
    names, parts = mesh.mesh_dim_names or (), axis.split(".")
    return math.prod(mesh[part].size() for part in parts) if set(parts) <= set(names) else None


def _groups(args: Any) -> Iterator[dist.ProcessGroup]:
    """The process groups among the arguments of an operator: objects, boxed objects or, for a functional operator,
    names."""
    for arg in args:
        if isinstance(arg, dist.ProcessGroup):
            yield arg
        elif isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            yield dist.ProcessGroup.unbox(arg)
        elif isinstance(arg, str) and arg not in REDUCTIONS:
            yield group_named(arg)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
