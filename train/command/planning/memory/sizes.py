"""The sizes of a layer's tensors on a rank, from the same shapes and splits as everything else.

Letters: N tokens of a microbatch on the rank, D width, Q and K columns of the rank's queries and keys, F of its
feed-forward, H its query heads, T the tokens of a sequence that attention sees, E experts, R rows of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from train.config.schema import AttentionKernel
from train.config.shapes import block, element_sizes, token_dim
from train.config.technique import Rank
from train.config.traffic import tokens_of
from train.strategies.context.keys import ContextKeys


@dataclass(frozen=True)
class Sizes:
    """`used`, `kept`: bytes of an element in the dtype of the computation, and of the weights. `shards`: ranks over
    which the tokens are sharded between split layers, `copies`: whether they are parts of sequences, which must be put
    in order. `tp`, `cp`: whether the technique runs, at degree 1 too.
    `gathered`, `adds_up`: as of a tape. `gathers_again`: whether the inputs of split layers are gathered again in the
    backward, and not kept, as Megatron's sequence parallelism does and the lab's does not. `cp_index`: the rank's place
    on `cp`, which says its two chunks of a sequence."""

    tokens: int
    dim: int
    queries: int
    keys: int
    hidden: int
    heads: int
    head_dim: int
    kv_heads: int
    seq_len: int
    used: int
    kept: int
    gathered: bool
    adds_up: bool
    tp: bool
    sequence_parallel: bool
    shards: int
    copies: bool
    cp: str
    cp_degree: int
    cp_index: int
    dropout: bool
    attention: AttentionKernel
    experts: int
    own_experts: int
    top_k: int
    expert_hidden: int
    shared_hidden: int
    exchanges: bool
    compiled: bool
    gathers_again: bool = False

    @property
    def wide(self) -> int:
        """Bytes of an element that is computed in float32 at least."""
        return max(self.used, 4)

    @property
    def casts(self) -> bool:
        """Whether a layer casts its weights before it uses them. FSDP gathers them in the dtype of the computation."""
        return self.used < self.kept and not self.gathered

    @cached_property
    def row(self) -> float:
        """Bytes of hidden states ND."""
        return float(self.tokens * self.dim * self.used)

    @property
    def shard(self) -> float:
        """Bytes of the rank's part of hidden states between split layers."""
        return self.row / self.shards

    @property
    def groups(self) -> bool:
        """Whether one kernel computes the products of all experts."""
        return self.used == 2 and self.expert_hidden % 8 == 0 and self.dim % 8 == 0

    @property
    def kernel(self) -> str:
        """Attention's kernel on a CUDA device: fused, math (torch's fallback) or eager (the lab's own)."""
        if self.attention is AttentionKernel.eager:
            return "eager"
        grouped = self.heads != self.kv_heads
        fused = self.head_dim % 8 == 0 and self.head_dim <= 256 if self.used == 2 else self.used == 4 and not grouped
        return "fused" if fused else "math"


def sizes_of(rank: Rank) -> Sizes:
    plan, model = rank.plan, rank.plan.config.model
    strategy, shapes = plan.config.strategy, block(model)
    kept, used = element_sizes(plan.config.precision)
    parts = {name: rank.computes(f"layers.0.{name}", shape) for name, shape in shapes.items()}
    experts = parts.get("feed_forward.experts.gate", (0, 0, 0))
    head_dim = model.dim // model.num_heads
    queries, keys = parts["attention.wq.weight"][0], parts["attention.wk.weight"][0]
    return Sizes(
        tokens=tokens_of(plan),
        dim=model.dim,
        queries=queries,
        keys=keys,
        hidden=parts.get("feed_forward.gate.weight", (0,))[0],
        heads=queries // head_dim,
        head_dim=head_dim,
        kv_heads=keys // head_dim,
        seq_len=plan.config.train.seq_len,
        used=used,
        kept=kept,
        gathered=strategy.uses_fsdp(),
        adds_up=strategy.reduces_once() and plan.num_microbatches > 1 and used == kept,
        tp="tp" in plan.axes,
        sequence_parallel=strategy.shards_sequence(),
        shards=plan.degrees["tp"] if strategy.shards_sequence() else 1,
        copies=token_dim(plan.config.train.micro_batch_size, plan.degrees["tp"]) > 0,
        cp=strategy.cp_method if isinstance(strategy, ContextKeys) and "cp" in plan.axes else "",
        cp_degree=plan.degrees["cp"],
        cp_index=rank.place["cp"],
        dropout=model.dropout > 0,
        attention=model.attention,
        experts=model.num_experts,
        own_experts=experts[0],
        top_k=model.top_k,
        expert_hidden=experts[1],
        shared_hidden=parts.get("feed_forward.shared.gate.weight", (0,))[0],
        exchanges=plan.splits_experts,
        compiled=plan.config.compile.enabled,
    )
