"""The distributed setup of a run: device and backend, process group, mesh, and sums over axes of the mesh."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.config.fields import IGNORE_INDEX
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config, RuntimeConfig
from train.config.strategy import BATCH_AXES, MESH_AXES, Strategy, resolve_degrees
from train.config.world import World

# The device types whose tensors each backend can send.
BACKEND_DEVICES = {"nccl": ("cuda",), "gloo": ("cpu", "cuda"), "xccl": ("xpu",), "hccl": ("npu",)}
ALLOCATOR = "PYTORCH_ALLOC_CONF"  # the settings of torch's allocator in the environment


@dataclass(frozen=True)
class Runtime:
    """The device and the backend of a rank. `note`: a line for the user if the choice may surprise, or empty."""

    device: torch.device
    backend: str
    note: str = ""


def choose_runtime(config: RuntimeConfig, world: World) -> Runtime:
    """The device and the backend of this rank. Raises BadInput (exit code 3) if the machine does not have them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if accelerator is not None else 0
    kind, note = config.device, ""
    if kind == "auto":
        kind = "cpu"
        if accelerator is not None:
            backend = _default_backend(accelerator.type)
            shared = config.backend == "gloo" and accelerator.type == "cuda"
            if backend == "gloo" and world.world_size > 1:
                note = f"{accelerator.type} has no distributed backend of its own: running on the CPU"
            elif count < world.local_world_size and not shared:
                note = f"{world.local_world_size} processes, {count} {accelerator.type} device(s): running on the CPU"
            elif config.backend not in ("auto", backend) and not shared:
                note = f"runtime.backend={config.backend} cannot send {accelerator.type} tensors: running on the CPU"
            else:
                kind = accelerator.type
    elif kind != "cpu" and (accelerator is None or accelerator.type != kind):
        _refuse(
            "device", f"runtime.device={kind}, but this machine has no {kind} device", "use runtime.device=auto or cpu"
        )
    backend = config.backend if config.backend != "auto" else _default_backend(kind)
    if backend not in BACKEND_DEVICES and backend not in dist.Backend.backend_list:
        _refuse("backend", f"runtime.backend={backend} is not known", f"use {', '.join(['auto', *BACKEND_DEVICES])}")
    if kind not in BACKEND_DEVICES.get(backend, (kind,)):
        moved = " or ".join(BACKEND_DEVICES[backend])
        _refuse(
            "backend",
            f"runtime.backend={backend} needs a {moved} device, but the run would be on {kind}",
            "use runtime.backend=auto",
        )
    if config.elastic and backend not in ("gloo", "nccl"):
        _refuse(
            "elastic_backend",
            f"runtime.elastic=true needs gloo or nccl, but the run is on {backend}",
            "use runtime.backend=gloo",
        )
    if not dist.is_backend_available(backend):
        _refuse("backend", f"this build of torch does not have runtime.backend={backend}", "use runtime.backend=auto")
    if kind == "cpu":
        return Runtime(torch.device("cpu"), backend, note)
    if count < world.local_world_size and backend != "gloo":
        _refuse(
            "devices",
            f"{world.local_world_size} processes on this machine, but {count} {kind} device(s)",
            f"use {count} processes, runtime.device=cpu, or runtime.backend=gloo to share a GPU",
        )
    if kind == "cuda":
        let_segments_grow(os.environ)
    return Runtime(torch.device(kind, world.local_rank % count), backend, note)


def let_segments_grow(environment: MutableMapping[str, str]) -> None:
    """Let CUDA's allocator grow its segments of memory, unless the environment has settings of its own. Otherwise a run
    ends at some 93 % of a device's memory, as free blocks do not fit. It counts until the first tensor is on a GPU."""
    if not {ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment[ALLOCATOR] = "expandable_segments:True"


def check_backend(strategy: Strategy, backend: str) -> None:
    """Raises BadInput (exit code 3) if the strategy has an option that needs another backend."""
    if (needed := strategy.needed_backend()) and needed[0] != backend:
        option = f"strategy.{needed[1]}"
        _refuse(
            "strategy_backend", f"{option}=true needs {needed[0]}, but the run is on {backend}", f"use {option}=false"
        )


def _default_backend(device_type: str) -> str:
    try:
        return dist.get_default_backend_for_device(device_type)
    except ValueError:  # torch has no backend for this device type, such as mps
        return "gloo"


def _refuse(rule: str, message: str, fix: str) -> None:
    raise BadInput(Problem(rule, message, fix, exit_code=EXIT_ENVIRONMENT))


@contextmanager
def process_group(
    runtime: Runtime,
    world: World,
    timeout_s: float,
    store: dist.Store | None = None,
    close: Callable[[], None] = dist.destroy_process_group,
) -> Iterator[None]:
    """Open the process group of the world, and close it at the end by `close`, also after an error. Without torchrun
    the world has one process. `store` replaces the store that torch would create."""
    if runtime.device.type != "cpu":
        torch.accelerator.set_device_index(runtime.device.index)
    timeout = timedelta(seconds=timeout_s)
    if store is None and not world.from_torchrun:
        store = dist.HashStore()
    elif store is None and world.store is not None and world.one_agent:
        store = _store_of_attempt(*world.store, world, timeout)
    options: dict[str, Any] = (
        {} if store is None else {"store": store, "rank": world.rank, "world_size": world.world_size}
    )
    with default_timeout(timeout):
        dist.init_process_group(runtime.backend, timeout=timeout, **options)
        try:
            yield
        finally:
            close()


def _store_of_attempt(host: str, port: int, world: World, timeout: timedelta) -> dist.Store:
    """The store in torchrun's agent, with a prefix for each start of the ranks. The store outlives a restart, and keeps
    the addresses of the ranks that have ended; new ranks would try to connect to them (pytorch#167288). Agents of
    several machines count restarts differently (pytorch#135712), so there torch's own store is used without a prefix.
    """
    store = dist.TCPStore(host, port, world.world_size, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"attempt_{world.restarts_done}", store)


@contextmanager
def default_timeout(timeout: timedelta) -> Iterator[None]:
    """Replace torch's default timeout of 10 or 30 minutes for groups that are made without one, as meshes and DeepSpeed
    make them. It sets private variables of torch (2.11 to 2.13), because a mesh has no option for it."""
    names = ("default_pg_timeout", "default_pg_nccl_timeout")
    before = {name: getattr(distributed_c10d, name) for name in names}
    for name in names:
        setattr(distributed_c10d, name, timeout)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(distributed_c10d, name, value)


def build_mesh(config: Config, runtime: Runtime) -> DeviceMesh:
    """A mesh with all of MESH_AXES; an axis that the strategy does not name has degree 1. Collective over the world.

    Raises BadInput as `check_backend` does.
    """
    check_backend(config.strategy, runtime.backend)
    degrees = resolve_degrees(config.strategy.mesh_axes(), dist.get_world_size())
    mesh = init_device_mesh(runtime.device.type, tuple(degrees.values()), mesh_dim_names=MESH_AXES)
    assert mesh.size() == dist.get_world_size()
    return mesh


def close_groups() -> None:
    """Close every process group except the world's, when their meshes are no longer used. Collective over the world. It
    uses a private variable of torch (2.11 to 2.13)."""
    for group in list(distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    forget_meshes()


def forget_meshes() -> None:
    """Empty DTensor's cache of placements, which would return a closed mesh for an equal new one. It is private (torch
    2.11 to 2.13)."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()


def own_device(mesh: DeviceMesh) -> torch.device:
    """The device of this rank, which `process_group` has set."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def own_rows(mesh: DeviceMesh, global_batch_size: int, *, multiple: int = 1) -> slice:
    """This rank's rows of the global batch, which depend on its position on the batch axes only. All ranks have equally
    many, and a multiple of `multiple`; so the last rows may be beyond the batch."""
    index, count = 0, 1
    for axis in BATCH_AXES:
        index = index * mesh[axis].size() + mesh[axis].get_local_rank()
        count *= mesh[axis].size()
    rows = -(-global_batch_size // (count * multiple)) * multiple
    return slice(index * rows, (index + 1) * rows)


def sum_over(x: Tensor, mesh: DeviceMesh, *axes: str) -> Tensor:
    """Sum `x` in place over each of the axes."""
    for axis in axes:
        if mesh[axis].size() > 1:
            dist.all_reduce(x, group=mesh[axis].get_group())
    return x


def count_valid(targets: Tensor, mesh: DeviceMesh) -> Tensor:
    """How many targets of the global batch have a loss, counted from this rank's rows."""
    return sum_over((targets != IGNORE_INDEX).sum(), mesh, *BATCH_AXES)


def inverse_valid(targets: Tensor, mesh: DeviceMesh, dtype: torch.dtype) -> Tensor:
    """1 / `count_valid`, which turns a sum of token losses into the global batch's mean; 1 if no target is valid."""
    return 1.0 / count_valid(targets, mesh).to(dtype).clamp(min=1)


def make_deterministic() -> None:
    """Use only kernels whose result does not depend on timing. Call it before the device's libraries start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
