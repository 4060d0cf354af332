"""Attention in blocks of keys. Each block gives the log-sum-exp of its scores, with which blocks are merged.

It uses plain tensors and no ranks. Shapes: B batch, T tokens, H query heads, K key-value heads (K divides H), E head
width. The algebra is FlashAttention's (Dao et al. 2022; the log-sum-exp form is that of Dao 2023): with
p = exp(scores - lse) of the *merged* log-sum-exp, a block's gradients need the final output, but no other block.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor

from train.model.transformer import upcast

aten = torch.ops.aten


class Kernel(Enum):
    """How blocks are computed: by torch's operators for cuDNN's or for flash kernels, or by the formula."""

    cudnn = "cudnn"
    flash = "flash"
    formula = "formula"


def preferred_kernel(device: torch.device) -> Kernel:
    """The kernel for a device, in the cases in which torch's `scaled_dot_product_attention` takes it too (torch 2.11 to
    2.13): cuDNN's on H100, H200 and B200, where it is faster, unless only deterministic algorithms are allowed. Older
    cuDNN is wrong for lengths that 128 does not divide (pytorch#169849)."""
    if device.type != "cuda":
        return Kernel.formula
    if torch.version.cuda is None or torch.are_deterministic_algorithms_enabled():
        return Kernel.flash
    new = (torch.backends.cudnn.version() or 0) > 91500 and torch.backends.cuda.cudnn_sdp_enabled()
    return Kernel.cudnn if new and torch.cuda.get_device_capability(device) in ((9, 0), (10, 0)) else Kernel.flash


def fitting_kernel(q: Tensor, k: Tensor, preferred: Kernel) -> Kernel:
    """The preferred kernel, or the next that supports this input. The operators of both are private."""
    width = q.shape[-1]
    if preferred is Kernel.formula or q.dtype not in (torch.bfloat16, torch.float16) or width % 8 or width > 256:
        return Kernel.formula
    if width > 128 or min(q.shape[2], k.shape[2]) == 1:
        return Kernel.flash
    return preferred


def empty_result(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out BHTE, lse BHT) of attention over no keys, in float32 or float64: the start for `accumulate`."""
    out = torch.zeros_like(upcast(q))
    return out, torch.full_like(out[..., 0], -math.inf)


def accumulate(out: Tensor, lse: Tensor, rows: slice, block: tuple[Tensor, Tensor]) -> None:
    """Merge a block into the rows of an accumulated result that belong to its queries, in place."""
    merged = merge(out[:, :, rows], lse[:, :, rows], *block)
    out[:, :, rows], lse[:, :, rows] = merged


def merge(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from the attention over each. The weights are the sets' shares of the
    sum of exponentials."""
    total = torch.logaddexp(lse, block_lse)
    before, now = ((x - total).exp().unsqueeze(-1) for x in (lse, block_lse))
    return out * before + upcast(block_out) * now, total


def rounded(out: Tensor, q: Tensor) -> Tensor:
    """An accumulated result in the dtype of the queries. In compiled code of torch 2.11, a function's result that `to`
    returned unchanged loses its gradient."""
    return out if out.dtype is q.dtype else out.to(q.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, preferred: Kernel) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(E)) V with its log-sum-exp: (out BHTE, lse BHT). `causal` needs as many keys as queries.

    The formula has the scores, T x keys for each head, in memory, and computes in float32 or float64: with bf16 the
    error of a block's dk was 6e-3 instead of 2e-3.
    """
    kernel = fitting_kernel(q, k, preferred)
    if kernel is Kernel.cudnn:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
        return out, lse.squeeze(-1)
    if kernel is Kernel.flash:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
        return out, lse
    q, k, v = (upcast(x) for x in (q, k, v))
    scores = _scores(q, k, causal)
    lse = scores.logsumexp(-1)
    share = (scores - lse.unsqueeze(-1)).exp()
    out = _by_head(share @ v, q)
    return out, lse.view(out.shape[:-1])


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool, preferred: Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq BHTE, dk BKTE, dv BKTE) of one block; `out`, `lse` and `grad` are those of the merged result."""
    kernel = fitting_kernel(q, k, preferred)
    if kernel is not Kernel.formula:
        tensors = [x.contiguous() for x in (grad, q, k, v, out, lse)]
        lengths = (None, None, q.shape[2], k.shape[2])
        # both take the random state of dropout, which they do not read, as there is no dropout
        if kernel is Kernel.flash:
            state = torch.empty(2, dtype=torch.uint64, device=q.device)
            return aten._scaled_dot_product_flash_attention_backward(*tensors, *lengths, 0.0, causal, state, state)
        tensors[-1] = tensors[-1].unsqueeze(-1)
        states = torch.empty(2, dtype=torch.int64, device=q.device).unbind()
        return aten._scaled_dot_product_cudnn_attention_backward(*tensors, *states, None, *lengths, 0.0, causal)
    grad, q, k, v, out = (upcast(x) for x in (grad, q, k, v, out))
    grad_, q_, out_ = (_by_kv_head(x, k) for x in (grad, q, out))
    share = (_scores(q, k, causal) - lse.reshape(*q_.shape[:-1], 1)).exp()
    mean = (grad_ * out_).sum(-1, keepdim=True)
    d_scores = share * (grad_ @ v.transpose(-1, -2) - mean) / math.sqrt(q.shape[-1])
    return _by_head(d_scores @ k, q), d_scores.transpose(-1, -2) @ q_, share.transpose(-1, -2) @ grad_


def _scores(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """The scores [B, K, H/K x T, keys]: the queries of the heads that share a KV head follow one another."""
    scores = _by_kv_head(q, k) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        assert q.shape[2] == k.shape[2]
        future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future.repeat(q.shape[1] // k.shape[1], 1), -math.inf)
    return scores


def _by_kv_head(x: Tensor, k: Tensor) -> Tensor:
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def _by_head(x: Tensor, q: Tensor) -> Tensor:
    return x.reshape(*q.shape[:-1], x.shape[-1])
