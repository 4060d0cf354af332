"""Context parallelism without a world: the layout, the merging of blocks, and memory that falls with the degree."""

import pytest
import torch

from scripts.calibrating.context_memory import saved_bytes
from train.command import cli
from train.model.transformer import SdpaKernel
from train.strategies.context.apply import by_rank, in_sequence, positions_of, ring_piece
from train.strategies.context.block_attention import accumulate, attend, empty_result


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
            block = attend(q[:, :, mine[rows]], k[:, :, theirs], v[:, :, theirs], causal=causal, fused=True)
            accumulate(out, lse, rows, block)
        assert torch.allclose(out, whole[:, :, mine], atol=1e-12)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_activations_fall_with_the_degree(method):
    config = parse("strategy=cp", f"strategy.cp_method={method}", "train.seq_len=1024", "model.num_layers=2")
    assert saved_bytes(config, method, 4) < 0.35 * saved_bytes(config, method, 1)
