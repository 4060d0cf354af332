"""What gloo puts on the wire: for each operation, the bytes over an edge of its ring, and the messages one after
another.

gloo has no reduce_scatter of its own: torch makes an all_reduce of the whole tensor and keeps a part (torch 2.11 to
2.13). all_to_all is sent in pairs, and `send` goes to the next rank only.
"""

from __future__ import annotations

RINGS = {"all_reduce": 2, "reduce_scatter": 2, "all_gather": 1}  # how often a tensor goes round, but for one part of it


def edge_bytes(op: str, ranks: int, size: float) -> float:
    """Bytes over one edge, in one direction. `size`: by nccl-tests' convention, the whole tensor; of a `send`, what one
    rank sends. Of an `all_to_all`, what a rank sends to each of the others."""
    if op == "send" or ranks < 2:
        return float(size)
    if op == "all_to_all":
        return size / ranks
    return RINGS.get(op, 1) * (ranks - 1) / ranks * size
