"""Context parallelism over the axis `cp`, for long sequences: each rank has T/cp tokens of every sequence.

    cp = 2, four chunks    rank 0: 0 3    rank 1: 1 2     the same causal work for every rank (Brandon et al. 2023)

Everything except attention is local to a token. `strategy.cp_method` chooses how attention works. A rank's keys and
values are S = 2 x B x T/cp x K x E elements (docs/context-parallelism.md has measured bytes and memory):
- allgather (Llama 3: Dubey et al. 2024): K and V are gathered, and their gradients reduce-scattered. It sends (cp-1) S
  in the forward, and again in the backward.
- ring (Liu et al. 2023): K and V go round the ring of ranks while each rank computes with the block that it has; their
  gradients follow them. It sends (cp-1) S in the forward and (2cp-1) S in the backward. Memory falls with cp.
- ulysses (Jacobs et al. 2023): all-to-alls exchange tokens for heads and back. Memory falls with cp, which must divide
  the number of KV heads.

Parameters are whole on every rank, or sharded over dp_shard x cp. Gradients are summed over `cp` as over the data axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from train.model.transformer import SdpaKernel, Transformer, upcast
from train.ranks import collectives
from train.strategies.context.block_attention import (
    Kernel,
    accumulate,
    attend,
    attend_backward,
    empty_result,
    preferred_kernel,
    rounded,
)

SEQUENCE_DIM = 2  # of q, k, v: BHTE


def positions_of(rank: int, size: int, seq_len: int) -> Tensor:
    """The positions of a rank's tokens: chunks `rank` and `2 size - 1 - rank` of 2 size chunks, in this order."""
    chunks = torch.arange(seq_len).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def shard_input(model: Transformer, args: tuple[Tensor, ...], *, positions: Tensor) -> tuple[Tensor, Tensor]:
    """A hook before the model: it selects this rank's tokens of whole rows, or passes on hidden states [B, T/cp, D],
    and adds their positions."""
    x = args[0]
    return (x[:, positions] if model.embed is not None else x), positions


def shard_targets(module: nn.Module, args: tuple[Tensor, ...], *, positions: Tensor) -> tuple[Tensor, ...]:
    """A hook before the loss: it selects this rank's targets, which were shifted when the sequence was whole."""
    return args[0], args[1][:, positions], *args[2:]


class AllGatherKernel(nn.Module):
    """Attention of this rank's queries to the gathered keys and values of all ranks, in the sequence's order. Fused
    kernels compute no masked score; the formula computes whole diagonal blocks, which is 1/(2 cp) more work."""

    def __init__(self, group: ProcessGroup, *, preferred: Kernel) -> None:
        super().__init__()
        self.group, self.preferred = group, preferred

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = self.group.size()
        both = collectives.all_gather(torch.stack((k, v)), SEQUENCE_DIM + 1, self.group)
        k, v = in_sequence(both.unflatten(SEQUENCE_DIM + 1, (size, -1)).movedim(SEQUENCE_DIM + 1, 0)).unbind()
        return _Pieces.apply(q, k, v, self.group.rank(), size, self.preferred)


class RingKernel(nn.Module):
    """Ring attention. It can be compiled: every message depends on the one before, so that the compiler cannot order
    two messages differently on two ranks."""

    def __init__(self, group: ProcessGroup, *, preferred: Kernel) -> None:
        super().__init__()
        self.group, self.preferred = group, preferred

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Ring.apply(q, k, v, self.group, self.preferred)


class UlyssesKernel(nn.Module):
    """Gives the ordinary kernel all tokens of 1/cp of the heads."""

    def __init__(self, group: ProcessGroup, inner: nn.Module) -> None:
        super().__init__()
        self.group, self.inner = group, inner

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = self.group.size()
        heads = [x.shape[1] // size for x in (q, k, v)]
        both = torch.cat([x.unflatten(1, (size, -1)) for x in (q, k, v)], dim=2).movedim(1, 0)
        whole = in_sequence(collectives.exchange(both, self.group))
        out = self.inner(*whole.split(heads, dim=1))
        return collectives.exchange(by_rank(out, size), self.group).movedim(0, 1).flatten(1, 2)


def in_sequence(x: Tensor) -> Tensor:
    """[cp, ..., T/cp, E], each rank's tokens in its own order -> [..., T, E] in the sequence's order."""
    head, tail = x.unflatten(-2, (2, -1)).unbind(-3)
    return torch.cat((head, tail.flip(0))).movedim(0, -3).flatten(-3, -2)


def by_rank(x: Tensor, size: int) -> Tensor:
    """[..., T, E] in the sequence's order -> [cp, ..., T/cp, E], each rank's tokens in its own order."""
    head, tail = x.unflatten(-2, (2 * size, -1)).movedim(-3, 0).chunk(2)
    return torch.stack((head, tail.flip(0)), dim=-3).flatten(-3, -2)


class _Pieces(torch.autograd.Function):
    """Causal attention of a rank's two chunks of queries to keys and values in the sequence's order."""

    @staticmethod
    def pieces(rank: int, size: int, seq_len: int) -> Iterable[tuple[slice, slice, bool]]:
        """(queries, keys, causal) of each chunk: its own block on the diagonal, and all keys before it."""
        length = seq_len // (2 * size)
        for rows, chunk in ((slice(length), rank), (slice(length, 2 * length), 2 * size - 1 - rank)):
            yield rows, slice(chunk * length, (chunk + 1) * length), True
            if chunk > 0:
                yield rows, slice(chunk * length), False

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, preferred: Kernel) -> Tensor:
        out, lse = empty_result(q)
        for rows, keys, causal in _Pieces.pieces(rank, size, k.shape[2]):
            block = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=causal, preferred=preferred)
            accumulate(out, lse, rows, block)
        out = rounded(out, q)
        ctx.rank, ctx.size, ctx.preferred = rank, size, preferred
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(upcast(x)) for x in (q, k, v))
        for rows, keys, causal in _Pieces.pieces(ctx.rank, ctx.size, k.shape[2]):
            block = (grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows])
            parts = attend_backward(*block, causal=causal, preferred=ctx.preferred)
            for total, where, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
                total[:, :, where] += part
            del parts, part  # before the gradients of the next block
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def ring_source(step: int, rank: int, size: int) -> int:
    """The rank whose keys and values this rank has at a step of the ring."""
    return (rank - step) % size


def ring_piece(source: int, rank: int, tokens: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) of this rank's two chunks with the source's two chunks, without what is masked.

    The first chunk of a rank before this one is before both chunks here, and its second chunk is after both. The two
    chunks of a rank after this one are between the two chunks here.
    """
    everything, half = slice(tokens), tokens // 2
    if source == rank:
        return everything, everything, True
    return (everything, slice(half), False) if source < rank else (slice(half, tokens), everything, False)


class _Ring(torch.autograd.Function):
    """At step s, rank r computes with the keys and values of rank r - s, and at the same time sends them to r + 1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, preferred: Kernel) -> Tensor:
        rank, size = group.rank(), group.size()
        out, lse = empty_result(q)
        kv = torch.stack((k, v))
        for step in range(size):
            arriving = send_on([kv], group) if step < size - 1 else None
            rows, keys, causal = ring_piece(ring_source(step, rank, size), rank, q.shape[2])
            here_k, here_v = kv[:, :, :, keys].unbind()
            accumulate(out, lse, rows, attend(q[:, :, rows], here_k, here_v, causal=causal, preferred=preferred))
            if arriving is not None:
                (kv,) = arrived(arriving, [kv])
        out = rounded(out, q)
        ctx.group, ctx.preferred = group, preferred
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of K and V follow one step behind. At step s the sum of the terms of ranks r-1, r-2, … arrives for
        the keys that are here now, and this rank adds its own. One last message brings them to their rank."""
        q, k, v, out, lse = ctx.saved_tensors
        rank, size = ctx.group.rank(), ctx.group.size()
        kv = torch.stack((k, v))
        dq, dkv = torch.zeros_like(upcast(q)), torch.zeros_like(upcast(kv))
        for step in range(size):
            travelling = ([dkv] if step > 0 else []) + ([kv] if step < size - 1 else [])
            arriving = send_on(travelling, ctx.group) if size > 1 else None
            rows, keys, causal = ring_piece(ring_source(step, rank, size), rank, q.shape[2])
            here_k, here_v = kv[:, :, :, keys].unbind()
            mine = (x[:, :, rows] for x in (out, lse))
            block = (grad[:, :, rows], q[:, :, rows], here_k, here_v, *mine)
            dq_part, dk, dv = attend_backward(*block, causal=causal, preferred=ctx.preferred)
            dq[:, :, rows] += dq_part
            if arriving is not None:
                received = arrived(arriving, travelling)
                dkv = received[0] if step > 0 else torch.zeros_like(dkv)
                kv = received[-1]  # in the last step these are not K and V, which it does not need
            dkv[:, :, :, keys] += torch.stack((dk, dv))
        if size > 1:
            (dkv,) = arrived(send_on([dkv], ctx.group), [dkv])
        dk, dv = dkv.to(k.dtype).unbind()
        return dq.to(q.dtype), dk, dv, None, None


def send_on(tensors: list[Tensor], group: ProcessGroup) -> Callable[[], Tensor]:
    """Start to send tensors to the next rank of the ring, as one message of bytes; `arrived` takes the result and waits
    for the message of the previous rank. The widest dtype comes first, for alignment.

    It is an all-to-all in which only one part is not empty. It has no order of sends that could deadlock, gloo supports
    it for CUDA tensors (unlike send), and it can be compiled.
    """
    message = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])
    rank, size = group.rank(), group.size()
    to, source = ([message.numel() if peer == (rank + hop) % size else 0 for peer in range(size)] for hop in (1, -1))
    return collectives.start_exchange(message, to, source, group)


def arrived(wait: Callable[[], Tensor], like: list[Tensor]) -> list[Tensor]:
    """Wait for the message of the previous rank: tensors with the same shapes and dtypes as those that were sent."""
    parts = wait().split([x.numel() * x.element_size() for x in like])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]


def apply_cp(model: Transformer, mesh: DeviceMesh, *, method: str, seq_len: int) -> None:
    """Make the model, which is called with whole rows, compute only this rank's tokens. Nothing is sent here."""
    group = mesh.get_group()
    positions = positions_of(group.rank(), group.size(), seq_len).to(model.rope.device)
    model.register_forward_pre_hook(partial(shard_input, positions=positions))
    model.loss.register_forward_pre_hook(partial(shard_targets, positions=positions))
    fused = preferred_kernel(model.rope.device)
    layers: Iterable[Any] = model.layers.values()
    for layer in layers:
        inner = layer.attention.kernel
        if method == "ulysses":
            layer.attention.kernel = UlyssesKernel(group, inner)
        else:
            kernel = {"allgather": AllGatherKernel, "ring": RingKernel}[method]
            layer.attention.kernel = kernel(group, preferred=fused if isinstance(inner, SdpaKernel) else Kernel.formula)
