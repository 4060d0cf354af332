"""Matrix products, attention and elementwise work of a layer and of the head, on one rank, for one microbatch.

Letters: M rows (tokens), N columns of the result, K depth. Shapes are those of `config.shapes`, split by the plan's
techniques, so they are not repeated here. Products that share their input (q, k, v; gate, up) count as one, as other
programs compute them; `matrices` has those of the lab's own code, one by one, for a measured profile.
"""

from __future__ import annotations

from dataclasses import dataclass

from train.config.schema import AttentionKernel, ModelConfig
from train.config.shapes import Shape, block
from train.config.technique import Rank
from train.config.traffic import tokens_of

TILE = 128 * 256  # elements of a result that one processor computes at a time, in cuBLAS's and CUTLASS's fast kernels
TOGETHER = {"wq": "qkv", "wk": "qkv", "wv": "qkv", "gate": "up", "up": "up"}
# elements read and written per token, of unfused kernels that keep what the backward needs: two norms and two residual
# sums with their casts; the activation of a feed-forward; rotation and layout of queries, keys and values
WIDTH_PASSES, HIDDEN_PASSES, HEAD_PASSES = 14, 3, 4
HEAD_BYTES = 12  # per logit and direction: the product's result in 16 bits, the loss in 32 bits
Matrix = tuple[float, float]  # (columns, depth) of a weight
Call = tuple[float, float, float]  # (rows, columns, depth) of a product


@dataclass(frozen=True)
class Products:
    """Sums over matrix products: of MNK, of MN, of K, and their number."""

    volume: float = 0.0
    results: float = 0.0
    depths: float = 0.0
    calls: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.volume + other.volume,
            self.results + other.results,
            self.depths + other.depths,
            self.calls + other.calls,
        )

    def seconds(self, rate: float, tail: float, depth: float) -> float:
        """`rate`: FLOP/s. `tail`: elements of results that are lost by the last, partly filled round of tiles. `depth`:
        by how much the start and the end of a tile lengthen its loop over K."""
        padded = self.volume + depth * self.results + tail * (self.depths + self.calls * depth)
        return 2 * padded / rate


def product(rows: float, columns: float, depth: float) -> Products:
    return Products(rows * columns * depth, rows * columns, depth, 1)


@dataclass(frozen=True)
class Work:
    """Forward work of one layer: bytes of elementwise kernels, attention's FLOPs and scores; and both directions of
    the products."""

    forward: Products
    backward: Products
    bytes: float
    attention_flops: float
    scores: float
    fused: bool  # attention keeps its scores on the chip
    matrices: tuple[Matrix, ...]  # as they are multiplied here, each by itself
    heads: float  # of all sequences of the microbatch


@dataclass(frozen=True)
class Direction:
    """Seconds of one layer's forward or backward of one microbatch. `rest`: gaps between kernels, delays of the host, and
    copies and casts of weights."""

    products: float
    attention: float
    elementwise: float
    rest: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.elementwise + self.rest


def calls_of(columns: float, depth: float, rows: float) -> tuple[Call, Call, Call]:
    """The products of `rows` tokens with a matrix: forward, then the gradients of the input and of the weight."""
    return (rows, columns, depth), (rows, depth, columns), (columns, depth, rows)


def both_ways(matrices: list[Matrix], rows: float) -> tuple[Products, Products]:
    """Forward and backward of products of `rows` tokens with matrices."""
    forward, backward = Products(), Products()
    for columns, depth in matrices:
        first, *others = calls_of(columns, depth, rows)
        forward += product(*first)
        for other in others:
            backward += product(*other)
    return forward, backward


def layer(rank: Rank) -> Work:
    plan, model, tokens = rank.plan, rank.plan.config.model, tokens_of(rank.plan)
    whole = block(model)
    parts = {name: rank.computes(f"layers.0.{name}", shape) for name, shape in whole.items()}
    alone = {
        name: _matrix(shape, model) for name, shape in parts.items() if len(shape) > 1 and "router" not in name
    }
    merged: dict[str, list[Matrix]] = {}
    for name, matrix in alone.items():
        merged.setdefault(_input_of(name), []).append(matrix)
    matrices = [(sum(columns for columns, _ in group), group[0][1]) for group in merged.values()]
    forward, backward = both_ways(matrices, tokens)
    shards = plan.degrees["tp"] if plan.config.strategy.shards_sequence() else 1
    qkv = sum(parts[f"attention.{name}.weight"][0] for name in ("wq", "wk", "wv"))
    hidden = sum(columns for name, group in merged.items() if name.endswith(".up") for columns, _ in group)
    elements = WIDTH_PASSES * model.dim / shards + HIDDEN_PASSES * hidden + HEAD_PASSES * qkv
    heads = parts["attention.wq.weight"][0] * model.num_heads // model.dim
    scores = tokens * plan.config.train.seq_len * heads
    fused = model.attention is AttentionKernel.sdpa
    causal = scores / 2 if fused else scores
    flops = 4 * causal * (model.dim // model.num_heads)
    sequences = plan.config.train.micro_batch_size
    return Work(
        forward, backward, 2 * tokens * elements, flops, causal, fused, (*alone.values(),), heads * sequences
    )


def head(rank: Rank) -> tuple[Products, Products, float]:
    """Forward, backward and the bytes of the loss, in each direction."""
    tokens, (columns, depth) = tokens_of(rank.plan), head_matrix(rank)
    forward, backward = both_ways([(columns, depth)], tokens)
    return forward, backward, HEAD_BYTES * tokens * columns


def head_matrix(rank: Rank) -> Matrix:
    model = rank.plan.config.model
    columns, depth = rank.computes("head.weight", (model.vocab_size, model.dim))
    return columns, depth


def _input_of(name: str) -> str:
    """The products of a layer that share an input have the same key."""
    path = name.removesuffix(".weight")
    parent, _, last = path.rpartition(".")
    return f"{parent}.{TOGETHER.get(last, last)}"


def _matrix(shape: Shape, model: ModelConfig) -> Matrix:
    """(columns, depth) of the product with a weight. Of a mixture's experts, a token meets `top_k`, wherever they are:
    over all ranks of `ep`, each rank computes as many rows as it has tokens times `top_k`."""
    if len(shape) == 3:
        rows, depth = shape[1], shape[2]
        return rows * model.top_k, depth
    return shape[0], shape[1]
