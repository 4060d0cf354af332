"""Context parallelism over the axis `cp`: each rank holds T/cp tokens of every sequence, for long sequences.

    cp = 2, four chunks    rank 0: 0 3    rank 1: 1 2     the same causal work for every rank (Brandon et al. 2023)

All but attention is local to a token. Attention is by `strategy.cp_method`; S = 2 x B x T/cp x K x E elements are a
rank's keys and values (docs/context-parallelism.md has bytes and memory, measured):
- allgather (Llama 3: Dubey et al. 2024): K and V gathered, their gradients reduce-scattered. (cp-1) S each way.
- ring (Liu et al. 2023): K and V travel round the ring while the block that is here is computed; their gradients
  travel behind them. (cp-1) S forward, (2cp-1) S backward; memory falls with cp.
- ulysses (Jacobs et al. 2023): all-to-all from tokens to heads and back; memory falls with cp, which must divide
  the KV heads.

Parameters are whole on every rank, or sharded over dp_shard x cp: gradients are summed over `cp` as over the data axes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from train.model.transformer import SdpaKernel, Transformer, upcast
from train.ranks import collectives
from train.strategies.context.block_attention import accumulate, attend, attend_backward, empty_result

SEQUENCE_DIM = 2  # of q, k, v: BHTE


def positions_of(rank: int, size: int, seq_len: int) -> Tensor:
    """Which tokens of a sequence a rank holds: chunks `rank` and `2 size - 1 - rank` of 2 size, in this order."""
    chunks = torch.arange(seq_len).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


def shard_input(model: Transformer, args: tuple[Tensor, ...], *, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Before the model: take this rank's tokens of the rows, or hidden states [B, T/cp, D] as they come; say where."""
    x = args[0]
    return (x[:, positions] if model.embed is not None else x), positions


def shard_targets(module: nn.Module, args: tuple[Tensor, ...], *, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Before the loss: this rank's targets, which were shifted when the sequence was whole."""
    return args[0], args[1][:, positions]


class AllGatherKernel(nn.Module):
    """Keys and values of all ranks, in the sequence's order, for this rank's queries. No masked score is computed by
    the flash kernel; the written-out one computes the diagonal blocks whole, 1/(2 cp) more."""

    def __init__(self, group: ProcessGroup, *, fused: bool) -> None:
        super().__init__()
        self.group, self.fused = group, fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = self.group.size()
        both = collectives.all_gather(torch.stack((k, v)), SEQUENCE_DIM + 1, self.group)
        k, v = in_sequence(both.unflatten(SEQUENCE_DIM + 1, (size, -1)).movedim(SEQUENCE_DIM + 1, 0)).unbind()
        return _Pieces.apply(q, k, v, self.group.rank(), size, self.fused)


class RingKernel(nn.Module):
    """Ring attention. Compiled blocks trace through it: every message depends on the one before, so that no
    compiler can order two of them differently on two ranks."""

    def __init__(self, group: ProcessGroup, *, fused: bool) -> None:
        super().__init__()
        self.group, self.fused = group, fused

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _Ring.apply(q, k, v, self.group, self.fused)


class UlyssesKernel(nn.Module):
    """All tokens of 1/cp of the heads, for the ordinary kernel."""

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
    """[cp, ..., T/cp, E], each rank's tokens as it holds them -> [..., T, E] in the sequence's order."""
    head, tail = x.unflatten(-2, (2, -1)).unbind(-3)
    return torch.cat((head, tail.flip(0))).movedim(0, -3).flatten(-3, -2)


def by_rank(x: Tensor, size: int) -> Tensor:
    """[..., T, E] in the sequence's order -> [cp, ..., T/cp, E], each rank's tokens as it holds them."""
    head, tail = x.unflatten(-2, (2 * size, -1)).movedim(-3, 0).chunk(2)
    return torch.stack((head, tail.flip(0)), dim=-3).flatten(-3, -2)


class _Pieces(torch.autograd.Function):
    """Causal attention of one rank's two chunks of queries over keys and values in the sequence's order."""

    @staticmethod
    def pieces(rank: int, size: int, seq_len: int) -> Iterable[tuple[slice, slice, bool]]:
        """(queries, keys, causal): for each chunk its own block, on the diagonal, and all that comes before."""
        length = seq_len // (2 * size)
        for rows, chunk in ((slice(length), rank), (slice(length, 2 * length), 2 * size - 1 - rank)):
            yield rows, slice(chunk * length, (chunk + 1) * length), True
            if chunk > 0:
                yield rows, slice(chunk * length), False

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, fused: bool) -> Tensor:
        out, lse = empty_result(q)
        for rows, keys, causal in _Pieces.pieces(rank, size, k.shape[2]):
            block = attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], causal=causal, fused=fused)
            accumulate(out, lse, rows, block)
        out = out.to(q.dtype)
        ctx.rank, ctx.size, ctx.fused = rank, size, fused
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(upcast(x)) for x in (q, k, v))
        for rows, keys, causal in _Pieces.pieces(ctx.rank, ctx.size, k.shape[2]):
            mine = (x[:, :, rows] for x in (out, lse))
            block = (grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], *mine)
            for total, where, part in zip(
                (dq, dk, dv), (rows, keys, keys), attend_backward(*block, causal=causal, fused=ctx.fused), strict=True
            ):
                total[:, :, where] += part
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def ring_source(step: int, rank: int, size: int) -> int:
    """Whose keys and values a rank holds at a step of the ring."""
    return (rank - step) % size


def ring_piece(source: int, rank: int, tokens: int) -> tuple[slice, slice, bool]:
    """(queries, keys, causal) of this rank's two chunks against the source's: what comes before is seen whole.

    A rank before this one has its head before both chunks and its tail after them; of a rank after, both lie between.
    """
    everything, half = slice(tokens), tokens // 2
    if source == rank:
        return everything, everything, True
    return (everything, slice(half), False) if source < rank else (slice(half, tokens), everything, False)


class _Ring(torch.autograd.Function):
    """Step s attends to the keys and values of rank r - s, while they are already on the way to rank r + 1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, group: ProcessGroup, fused: bool) -> Tensor:
        rank, size = group.rank(), group.size()
        out, lse = empty_result(q)
        kv = torch.stack((k, v))
        for step in range(size):
            arriving = send_on([kv], group) if step < size - 1 else None
            rows, keys, causal = ring_piece(ring_source(step, rank, size), rank, q.shape[2])
            here_k, here_v = kv[:, :, :, keys].unbind()
            accumulate(out, lse, rows, attend(q[:, :, rows], here_k, here_v, causal=causal, fused=fused))
            if arriving is not None:
                (kv,) = arrived(arriving, [kv])
        out = out.to(q.dtype)
        ctx.group, ctx.fused = group, fused
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of K and V follow one step behind: at step s, what ranks r-1, r-2, … found for the keys that
        are here now arrives, and this rank's part is added. One hop more than K and V brings them home."""
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
            dq_part, dk, dv = attend_backward(*block, causal=causal, fused=ctx.fused)
            dq[:, :, rows] += dq_part
            if arriving is not None:
                received = arrived(arriving, travelling)
                dkv = received[0] if step > 0 else torch.zeros_like(dkv)
                kv = received[-1]  # the last step receives none and needs none
            dkv[:, :, :, keys] += torch.stack((dk, dv))
        if size > 1:
            (dkv,) = arrived(send_on([dkv], ctx.group), [dkv])
        dk, dv = dkv.to(k.dtype).unbind()
        return dq.to(q.dtype), dk, dv, None, None


def send_on(tensors: list[Tensor], group: ProcessGroup) -> Tensor:
    """Start sending tensors to the next rank of the ring, as one message of bytes; `arrived` waits for the previous
    rank's. An all-to-all with one part that is not empty: no order of sends to deadlock, CUDA tensors under gloo (whose
    send does not move them), and compiled code may contain it. The widest dtype goes first, for alignment."""
    message = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors])
    rank, size = group.rank(), group.size()
    to, source = ([message.numel() if peer == (rank + hop) % size else 0 for peer in range(size)] for hop in (1, -1))
    return funcol.all_to_all_single(message, source, to, group)


def arrived(message: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Wait for a message from the previous rank: tensors of the same shapes and dtypes as were sent."""
    parts = funcol.wait_tensor(message).split([x.numel() * x.element_size() for x in like])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, like, strict=True)]


def apply_cp(model: Transformer, mesh: DeviceMesh, *, method: str, seq_len: int) -> None:
    """Make the model, which is called with whole rows, compute this rank's tokens of them. Nothing is sent."""
    group = mesh.get_group()
    positions = positions_of(group.rank(), group.size(), seq_len).to(model.rope.device)
    model.register_forward_pre_hook(partial(shard_input, positions=positions))
    model.loss.register_forward_pre_hook(partial(shard_targets, positions=positions))
    layers: Iterable[Any] = model.layers.values()
    for layer in layers:
        inner = layer.attention.kernel
        if method == "ulysses":
            layer.attention.kernel = UlyssesKernel(group, inner)
        else:
            kernel = {"allgather": AllGatherKernel, "ring": RingKernel}[method]
            layer.attention.kernel = kernel(group, fused=isinstance(inner, SdpaKernel))
