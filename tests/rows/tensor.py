"""Tensor and sequence parallelism."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, checkpointed, presets, row

DROPOUT = "model.dropout=0.1"
ONE_KV_HEAD, TWO_KV_HEADS = "model.num_kv_heads=1", "model.num_kv_heads=2"

ROWS = [
    *presets("tp", sizes=(1, 2, 4), single=2),
    row(2, "strategy=tp", "train.micro_batch_size=1"),  # parts of each sequence; the other rows split whole ones
    row(2, "strategy=tp", options=(BF16,)),
    row(2, "strategy=tp", options=(F64, TIED)),
    row(2, "strategy=tp", "strategy.sequence_parallel=false"),
    row(2, "strategy=tp", "strategy.loss_parallel=false"),
    row(2, "strategy=tp", options=(F64, "model.attention=eager")),
    *checkpointed(2, "strategy=tp"),
    row(2, "strategy=tp", options=(F64, "model.vocab_size=259")),
    row(4, "strategy=tp", "strategy.loss_parallel=false", options=(F64, TIED, "model.vocab_size=257")),
    # equal masks: the tp ranks of one sequence draw what one device draws
    row(2, "strategy=tp", "strategy.sequence_parallel=false", options=(F64, DROPOUT)),
    # ranks share a KV head
    row(2, "strategy=tp", options=(F64, ONE_KV_HEAD)),
    row(4, "strategy=tp", options=(F64, TWO_KV_HEADS)),
    row(4, "strategy=fsdp_tp", options=(F64, ONE_KV_HEAD)),
    row(2, "strategy=tp", options=(F64, ONE_KV_HEAD), bug="shared_head_gradient_not_summed"),
    row(2, "strategy=tp", bug="norm_gradient_not_summed"),
    row(2, "strategy=tp", bug="norm_counts_replicas"),
    row(2, "strategy=tp", bug="maximum_of_own_shard"),
    row(
        2,
        "strategy=tp",
        "strategy.sequence_parallel=false",
        options=(F64, DROPOUT),
        bug="masks_differ_where_tokens_are_replicated",
    ),
]
SLOW_ROWS = [
    row(4, "strategy=fsdp_tp", options=(F64, "model.vocab_size=259")),
    row(2, "strategy=tp", COMPILED, options=(F32,)),
    row(2, "strategy=tp", COMPILED, "train.activation_checkpointing=selective", options=(F32,)),
]
