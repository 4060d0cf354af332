"""Data parallelism: DDP, FSDP2, both."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, checkpointed, presets, row

DROPOUT = (F64, "model.dropout=0.1")

ROWS = [
    *presets("dp", "fsdp", sizes=(1, 2, 4), single=2),
    *presets("zero1", "zero2", sizes=(2, 4), single=2),
    *presets("hsdp", sizes=(4,), single=4),
    *(row(2, f"strategy={name}", options=(BF16,)) for name in ("dp", "fsdp")),
    *(row(2, f"strategy={name}", options=(F64, TIED)) for name in ("dp", "fsdp")),
    row(4, "strategy=hsdp", "strategy.zero_stage=1"),
    row(2, "strategy=fsdp", "strategy.reshard_after_forward=false"),
    row(2, "strategy=fsdp", "strategy.cpu_offload=true"),
    row(2, "strategy=dp", "strategy.bucket_mb=0.5"),
    row(2, "strategy=dp", "strategy.comm_hook=fp16", options=(F32,)),
    row(4, "strategy=dp", "strategy.comm_hook=bf16", options=(F32,)),
    row(2, "strategy=dp", "strategy.comm_hook=powersgd"),  # not compressed yet: the rest is test_comm_hooks.py's
    *(row(2, f"strategy={name}", options=(F32, "optim=adamw8bit")) for name in ("dp", "fsdp")),
    *checkpointed(2, "strategy=fsdp"),
    # the reference keeps its activations: recomputing must draw the same dropout masks again
    *(
        row(1, "strategy=dp", f"train.activation_checkpointing={mode}", options=DROPOUT)
        for mode in ("full", "selective")
    ),
    row(2, "strategy=dp", bug="accumulation_scale"),
    row(2, "strategy=dp", bug="rank_left_out"),
    row(2, "strategy=dp", bug="mean_of_means"),
    row(2, "strategy=dp", bug="norms_rounded_on_every_rank"),
    row(2, "strategy=dp", bug="own_tokens_times_ranks"),
    row(2, "strategy=fsdp", bug="shards_do_not_decay"),
    row(1, "strategy=dp", "train.activation_checkpointing=full", options=DROPOUT, bug="masks_not_replayed"),
]
SLOW_ROWS = [row(2, f"strategy={name}", COMPILED, options=(F32,)) for name in ("dp", "fsdp")]
