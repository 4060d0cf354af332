"""Differentiable collectives. The backward of each is its adjoint: a gather's backward is a reduce-scatter.

Each runs over the process group that it is given, and does not change its input. Compiled code needs torch's functional
collectives (a private module; torch 2.11 and 2.13): with an in-place `dist.all_reduce`, inductor of torch 2.11 lost the
gradient. Eager code here calls `torch.distributed` itself: a functional collective wraps every result in a subclass of
Tensor first, which takes the host longer than a small message takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 gave them new names and warns about the old ones
_COMPILED_GATHER = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_COMPILED_SCATTER = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor
GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def sum_of(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, without a gradient."""
    return _reduced(x, "sum", group)


def max_of(x: Tensor, group: ProcessGroup) -> Tensor:
    """The maximum over ranks, without a gradient."""
    return _reduced(x, "max", group)


def _reduced(x: Tensor, op: str, group: ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():
        return funcol.wait_tensor(funcol.all_reduce(x.contiguous(), op, group))
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, getattr(dist.ReduceOp, op.upper()), group)
    return out


def _all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate the ranks' equal shards along `dim`."""
    size = group.size()
    if _is_gloo(group):
        out = torch.ops.strategy_lab.all_gather(x.contiguous(), size, group.group_name)
    elif torch.compiler.is_compiling():
        out = _waited(_COMPILED_GATHER(x.contiguous(), 0, group))
    else:
        out = x.new_empty((size * x.shape[0], *x.shape[1:]))
        GATHER(out, x.contiguous(), group)
    # written as chunk and cat, which inductor can fuse with a matrix product (`tensor/apply.py: pipeline_products`)
    return torch.cat(out.chunk(size), dim) if dim else out


def _reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sum over ranks and keep this rank's equal shard along `dim`."""
    size = group.size()
    parts = torch.cat(x.chunk(size, dim)) if dim else x.contiguous()
    if _is_gloo(group):
        return torch.ops.strategy_lab.reduce_scatter(parts, size, group.group_name)
    if torch.compiler.is_compiling():
        return _waited(_COMPILED_SCATTER(parts, "sum", 0, group))
    out = parts.new_empty((parts.shape[0] // size, *parts.shape[1:]))
    SCATTER(out, parts, group=group)
    return out


def _waited(x: Tensor) -> Tensor:
    """The finished result. In compiled code torch adds the wait itself, and a second wait would prevent the fusion."""
    return x.wait() if isinstance(x, funcol.AsyncCollectiveTensor) else x


def _is_gloo(group: ProcessGroup) -> bool:
    """Whether the group's backend is gloo, where an all-to-all replaces both collectives: gloo gathers in a ring and
    runs a reduce-scatter as an all-reduce; an all-to-all does it in one round, with as many bytes or fewer."""
    return dist.get_backend(group) == "gloo"


# These are operators and not functions, so that the ledger, a profiler and a compiled graph see a gather or a
# reduce-scatter instead of the all-to-all inside. `custom_op` would make them slower to call.
_LIBRARY = torch.library.Library("strategy_lab", "FRAGMENT")
_LIBRARY.define("all_gather(Tensor x, int size, str group) -> Tensor")
_LIBRARY.define("reduce_scatter(Tensor parts, int size, str group) -> Tensor")


@torch.library.impl(_LIBRARY, "all_gather", "CompositeExplicitAutograd")
def _gather_by_exchange(x: Tensor, size: int, group: str) -> Tensor:
    return _exchanged(torch.cat([x] * size), group_named(group))


@torch.library.register_fake("strategy_lab::all_gather", lib=_LIBRARY)
def _(x: Tensor, size: int, group: str) -> Tensor:
    return x.new_empty((size * x.shape[0], *x.shape[1:]))


@torch.library.impl(_LIBRARY, "reduce_scatter", "CompositeExplicitAutograd")
def _reduce_scatter_by_exchange(parts: Tensor, size: int, group: str) -> Tensor:
    return _exchanged(parts, group_named(group)).unflatten(0, (size, -1)).sum(0)


@torch.library.register_fake("strategy_lab::reduce_scatter", lib=_LIBRARY)
def _(parts: Tensor, size: int, group: str) -> Tensor:
    return parts.new_empty((parts.shape[0] // size, *parts.shape[1:]))


def _exchanged(
    x: Tensor, group: ProcessGroup, send: list[int] | None = None, receive: list[int] | None = None
) -> Tensor:
    """The i-th part of dimension 0 goes to rank i; the result's i-th part came from rank i. `send`, `receive`: the rows
    of each part; None if all are equal."""
    if torch.compiler.is_compiling():
        return funcol.wait_tensor(funcol.all_to_all_single(x, receive, send, group))
    out = torch.empty_like(x) if receive is None else x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(out, x, receive, send, group)
    return out


def start_exchange(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Callable[[], Tensor]:
    """Begin to send the parts of a contiguous tensor, without a gradient. The result is to be called once: it waits for
    what the ranks sent, and returns it. Do not change the tensor before."""
    if torch.compiler.is_compiling():
        return partial(funcol.wait_tensor, funcol.all_to_all_single(x, receive, send, group))
    out = x.new_empty((sum(receive), *x.shape[1:]))
    work = dist.all_to_all_single(out, x, receive, send, group, async_op=True)

    def wait() -> Tensor:
        work.wait()
        return out

    return wait


def group_named(name: str) -> ProcessGroup:
    """The group with this `group_name`, by which operators name it (a private function; torch 2.11 to 2.13)."""
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def _own_shard(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_of(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_of(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, ctx.dim, ctx.group), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, ctx.dim, ctx.group), None, None


class _GatherReplicated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return _all_gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _own_shard(grad, ctx.dim, ctx.group), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int] | None, receive: list[int] | None, group: ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchanged(x.contiguous(), group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grad.contiguous(), ctx.group, ctx.receive, ctx.send), None, None, None


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: ProcessGroup) -> Tensor:
    """Send the first `send[0]` rows to rank 0, the next `send[1]` to rank 1, and so on. The result has `receive[i]`
    rows from each rank i, in the order of i. The backward returns each row's gradient to the rank that sent the row."""
    return _AllToAll.apply(x, send, receive, group)


def enter(x: Tensor, group: ProcessGroup) -> Tensor:
    """The identity; its backward all-reduces (Megatron's f). For a replicated activation that enters split weights."""
    return _Enter.apply(x, group)


def all_reduce(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks; its backward is the identity (Megatron's g). For the partial results of split weights."""
    return _Reduce.apply(x, group)


def all_gather(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate shards along `dim`. The backward reduce-scatters, because each rank uses the whole differently."""
    return _Gather.apply(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Sum over ranks and keep this rank's shard along `dim`. The backward all-gathers."""
    return _ReduceScatter.apply(x, dim, group)


def all_gather_replicated(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """Concatenate shards along `dim`, if all ranks then compute the same. The backward keeps this rank's shard."""
    return _GatherReplicated.apply(x, dim, group)


def exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """The i-th equal part of dimension 0 goes to rank i; the result's i-th part came from rank i. It is its own
    adjoint."""
    return _AllToAll.apply(x, None, None, group)
