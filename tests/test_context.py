"""Context parallelism without a world: the layout, the merging of blocks, and memory that falls with the degree."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from scripts.calibrating.context_memory import saved_bytes
from train.command import cli
from train.model.transformer import SdpaKernel
from train.strategies.context.apply import by_rank, in_sequence, positions_of, ring_piece
from train.strategies.context.block_attention import (
    Kernel,
    accumulate,
    attend,
    attend_backward,
    empty_result,
    fitting_kernel,
    preferred_kernel,
    rounded,
)


def parse(*overrides):
    return cli.parse(cli.parser("test", ""), list(overrides))[0]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_hold_every_token_once(size):
    length = 4 * size * 2
    held = [positions_of(rank, size, length) for rank in range(size)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    work = [int((positions + 1).sum()) for positions in held]  # keys that the rank's queries see
    assert max(work) == min(work)
    x = torch.randn(2, 3, length, 5)
    shards = torch.stack([x[:, :, positions] for positions in held])
    assert torch.equal(in_sequence(shards), x)
    assert torch.equal(by_rank(x, size), shards)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ring_pieces_merge_to_causal_attention(size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 8, dtype=torch.float64) for heads in (8, 4, 4))
    whole = SdpaKernel()(q, k, v)
    for rank in range(size):
        mine = positions_of(rank, size, 32)
        out, lse = empty_result(q[:, :, mine])
        for source in reversed(range(size)):
            rows, keys, causal = ring_piece(source, rank, len(mine))
            theirs = positions_of(source, size, 32)[keys]
            block = attend(
                q[:, :, mine[rows]], k[:, :, theirs], v[:, :, theirs], causal=causal, preferred=Kernel.formula
            )
            accumulate(out, lse, rows, block)
        assert torch.allclose(out, whole[:, :, mine], atol=1e-12)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_activations_fall_with_the_degree(method):
    config = parse("strategy=cp", f"strategy.cp_method={method}", "train.seq_len=1024", "model.num_layers=2")
    assert saved_bytes(config, method, 4) < 0.35 * saved_bytes(config, method, 1)


@pytest.mark.parametrize(
    ("kind", "capability", "version", "deterministic", "expected"),
    [
        ("cpu", (9, 0), 91900, False, Kernel.formula),
        ("cuda", (9, 0), 91900, False, Kernel.cudnn),
        ("cuda", (10, 0), 91900, False, Kernel.cudnn),
        ("cuda", (9, 0), 91500, False, Kernel.flash),
        ("cuda", (8, 0), 91900, False, Kernel.flash),
        ("cuda", (12, 0), 91900, False, Kernel.flash),
        ("cuda", (9, 0), 91900, True, Kernel.flash),
    ],
)
def test_the_preferred_kernel(kind, capability, version, deterministic, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    assert preferred_kernel(torch.device(kind)) is expected


@pytest.mark.parametrize(
    ("width", "keys", "dtype", "expected"),
    [
        (128, 64, torch.bfloat16, Kernel.cudnn),
        (136, 64, torch.bfloat16, Kernel.flash),
        (64, 1, torch.float16, Kernel.flash),
        (264, 64, torch.bfloat16, Kernel.formula),
        (60, 64, torch.bfloat16, Kernel.formula),
        (64, 64, torch.float32, Kernel.formula),
    ],
)
def test_what_a_kernel_does_not_support_goes_to_the_next(width, keys, dtype, expected):
    q, k = (torch.empty(1, 2, length, width, dtype=dtype, device="meta") for length in (64, keys))
    assert fitting_kernel(q, k, Kernel.cudnn) is expected
    assert fitting_kernel(q, k, Kernel.formula) is Kernel.formula


def on_gpu(*lengths):
    """A query, and keys and values of two groups of heads, in bf16."""
    draw = partial(torch.randn, dtype=torch.bfloat16, device="cuda")
    return draw(2, 8, lengths[0], 64), *(draw(2, 4, lengths[1], 64) for _ in range(2))


@pytest.mark.gpu
def test_torch_would_take_the_same_kernel():
    q, k, v = on_gpu(256, 384)
    backend = SDPBackend(torch._fused_sdp_choice(q, k, v, None, 0.0, False, enable_gqa=True))
    assert backend.name.lower() == f"{fitting_kernel(q, k, preferred_kernel(q.device)).value}_attention"


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [Kernel.cudnn, Kernel.flash])
def test_a_fused_kernel_computes_blocks(kernel):
    """A block on the diagonal and one before it, whose gradients need the log-sum-exp of both."""
    torch.manual_seed(0)
    q, k, v = on_gpu(256, 640)
    if kernel is Kernel.cudnn and preferred_kernel(q.device) is not kernel:
        pytest.skip("torch does not take cuDNN's kernel here")
    grad = torch.randn_like(q)

    def computed(*tensors, preferred):
        grad, q, k, v = tensors
        blocks = [
            (k[:, :, part], v[:, :, part], causal) for part, causal in ((slice(384), False), (slice(384, 640), True))
        ]
        out, lse = empty_result(q)
        for k, v, causal in blocks:
            accumulate(out, lse, slice(None), attend(q, k, v, causal=causal, preferred=preferred))
        out = rounded(out, q)
        parts = [
            attend_backward(grad, q, k, v, out, lse, causal=causal, preferred=preferred) for k, v, causal in blocks
        ]
        return [out, lse, *(x for part in parts for x in part)]

    expected = computed(*(x.double() for x in (grad, q, k, v)), preferred=Kernel.formula)
    for found, exact in zip(computed(grad, q, k, v, preferred=kernel), expected, strict=True):
        assert (found.double() - exact).norm() < 0.01 * exact.norm()
