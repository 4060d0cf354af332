"""Gradients between the backward and the update, on every mesh: sums that are not complete yet, the norm, clipping.

This works on local shards with `torch._foreach_*` (private names; torch 2.11 to 2.13). A step needs only a few small
collectives, whatever the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec


def local(x: Tensor, grad_placements: tuple[Placement, ...] | None = None) -> Tensor:
    """This rank's shard if x is a DTensor, and x itself if it is a plain tensor. `grad_placements`: those of the
    gradient of x; None for those of x, which must not be Partial then."""
    if not isinstance(x, DTensor):
        return x
    if torch.compiler.is_compiling() or not x.requires_grad:
        return x.to_local(grad_placements=grad_placements)
    spec = x._spec if grad_placements is None else DTensorSpec(x.device_mesh, grad_placements, x._spec.tensor_meta)
    return _Local.apply(x, spec)


class _Local(torch.autograd.Function):
    """`DTensor.to_local`, whose backward works out the placements and strides of each gradient again. This takes the
    host longer than a small product takes, for every weight and microbatch, so here the gradient gets a description
    that is known beforehand. `_spec`, `_local_tensor` and the constructor are private (torch 2.11 to 2.13)."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, grad_spec: DTensorSpec) -> Tensor:
        ctx.spec = grad_spec
        ctx.set_materialize_grads(False)
        return x._local_tensor.view_as(x._local_tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[DTensor | None, None]:
        if grad is None:
            return None, None
        return DTensor(grad.contiguous(), copy(ctx.spec), requires_grad=False), None


def reduce_partial(parameters: Iterable[nn.Parameter]) -> None:
    """Complete gradients that are one term of a sum over a mesh axis (`Partial`): those of norms under sequence
    parallelism, and of KV heads that several ranks share.

    All such gradients are concatenated: there is one all-reduce per axis and step, whatever the number of microbatches.
    """
    pending: dict[dist.ProcessGroup, list[tuple[nn.Parameter, DTensor]]] = {}
    for p in parameters:
        if not isinstance(p.grad, DTensor):
            continue
        axes = [i for i, place in enumerate(p.grad.placements) if isinstance(place, Partial)]
        assert len(axes) <= 1, "a gradient must not be Partial over two axes"
        for axis in axes:
            pending.setdefault(p.grad.device_mesh.get_group(axis), []).append((p, p.grad))
    for group, terms in pending.items():
        flat = torch.cat([grad.to_local().flatten() for _, grad in terms])
        dist.all_reduce(flat, group=group)
        for (p, grad), total in zip(terms, flat.split([grad.to_local().numel() for _, grad in terms]), strict=True):
            total = total.view_as(grad.to_local())
            complete = [Replicate() if isinstance(place, Partial) else place for place in grad.placements]
            p.grad = DTensor.from_local(total, grad.device_mesh, complete, run_check=False)


@dataclass(frozen=True)
class SharedParameter:
    """A parameter of which one other rank uses a copy: an embedding that is tied to a head on another pipeline stage.

    Both ranks shard it in the same way. `peer`: the other rank's number in `group`. `counted`: whether the gradient's
    norm counts this copy.
    """

    parameter: nn.Parameter
    group: dist.ProcessGroup
    peer: int
    counted: bool


def sum_shared(shared: Iterable[SharedParameter], device: torch.device) -> None:
    """Complete the gradients of shared parameters: each is the sum of its two ranks' terms, bitwise equal on both.

    Each rank sends its local shard to the other once per step, as many bytes as in an all-reduce of two ranks. The
    messages are sent from `device`, because gradients may be in the host's memory.
    """
    for item in shared:
        assert item.parameter.grad is not None
        term = local(item.parameter.grad)
        own = term.to(device).contiguous()
        other = torch.empty_like(own)
        ops = [
            dist.P2POp(dist.isend, own, group=item.group, group_peer=item.peer),
            dist.P2POp(dist.irecv, other, group=item.group, group_peer=item.peer),
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        term.add_(other.to(term.device))


def shard_groups(grad: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which a complete gradient is split. Over other groups it is replicated, and must count once."""
    if not isinstance(grad, DTensor):
        return ()
    assert not any(isinstance(place, Partial) for place in grad.placements), "incomplete gradient"
    # This is not `isinstance(place, Shard)`, because FSDP over tp uses a private placement that is not a `Shard`.
    split = [i for i, place in enumerate(grad.placements) if not isinstance(place, Replicate)]
    return tuple(grad.device_mesh.get_group(i) for i in split)


def global_norm(gradients: Iterable[Tensor], pipeline: dist.ProcessGroup | None, device: torch.device) -> Tensor:
    """The 2-norm of the whole model's gradient, the same on every rank. The result is on `device`; gradients may be in
    the host's memory.

    The squares of shards are summed over the axes that shard them, a replicated gradient counts once, and the sums of
    stages are added over `pipeline`. Gradients must be complete (not `Partial`).
    """
    by_groups: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
    for grad in gradients:
        by_groups.setdefault(shard_groups(grad), []).append(local(grad))
    squares = []
    for axes, shards in by_groups.items():
        total = torch.stack(torch._foreach_norm(shards)).square().sum().to(device)
        for group in axes:
            if group.size() > 1:
                dist.all_reduce(total, group=group)
        squares.append(total)
    total = torch.stack(squares).sum()
    if pipeline is not None and pipeline.size() > 1:
        dist.all_reduce(total, group=pipeline)
    return total.sqrt()


def clip(gradients: Iterable[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scale gradients in place so that the global norm is at most `max_norm` (Pascanu et al. 2013)."""
    coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    grads = [local(grad) for grad in gradients]
    torch._foreach_mul_(grads, coefficient.to(grads[0].device))
