"""DeepSpeed's engines, in float32 at most. They run in separate worlds, because DeepSpeed changes the process state."""

from tests.rows.base import BF16, COMPILED, F32, TIED, Row, row

ZERO = ("ds_zero1", "ds_zero2", "ds_zero3")
PP2_ZERO1 = ("strategy=ds_pp", "strategy.pp=2", "strategy.dp_shard=2", "strategy.zero_stage=1")
PP1_DP2 = ("strategy=ds_pp", "strategy.pp=1", "strategy.dp_replicate=2")
PP2_DP2 = ("strategy=ds_pp", "strategy.pp=2", "strategy.dp_replicate=2")
TP2_DP2 = ("strategy=ds_autotp", "strategy.tp=2", "strategy.dp_shard=2")
AC = "train.activation_checkpointing="


def f32(size: int, *strategy: str, options: tuple[str, ...] = (), bug: str | None = None) -> Row:
    return row(size, *strategy, options=(F32, *options), bug=bug)


ROWS = [
    *(f32(2, f"strategy={name}") for name in (*ZERO, "ds_pp", "ds_autotp")),
    f32(2, "strategy=ds_zero2", "strategy.bucket_mb=0.05"),  # many buckets, some smaller than a parameter
    f32(2, "strategy=ds_pp", options=("train.global_batch_size=1",)),  # fewer microbatches than stages
    f32(2, *PP1_DP2),
    *(row(2, f"strategy={name}", options=(BF16,)) for name in ("ds_zero2", "ds_pp")),
    f32(2, "strategy=ds_zero2", bug="averaged_over_ranks"),
    f32(2, *PP1_DP2, bug="averaged_over_ranks"),
    f32(2, "strategy=ds_autotp", bug="tensor_ranks_averaged"),
]
SLOW_ROWS = [
    *(f32(2, f"strategy={name}", "strategy.offload_optimizer=true") for name in ("ds_zero1", "ds_zero2", "ds_zero3")),
    f32(2, "strategy=ds_zero3", "strategy.whole_below=8192"),
    *(f32(2, f"strategy={name}", options=(TIED,)) for name in ("ds_zero1", "ds_zero3", "ds_autotp")),
    *(f32(2, f"strategy={name}", options=(AC + "full",)) for name in ("ds_zero3", "ds_autotp")),
    *(f32(2, f"strategy={name}", options=(AC + "selective",)) for name in ("ds_zero3", "ds_pp")),
    *(f32(2, f"strategy={name}", COMPILED) for name in ("ds_zero2", "ds_pp")),
    *(f32(1, f"strategy={name}") for name in (*ZERO, "ds_pp", "ds_autotp")),
    *(f32(2, "strategy=ds_autotp", f"strategy.zero_stage={stage}") for stage in (2, 3)),
    f32(2, "strategy=ds_autotp", "strategy.tp=1", "strategy.dp_shard=2"),
    *(f32(4, f"strategy={name}") for name in (*ZERO, "ds_pp", "ds_autotp")),
    f32(4, *PP2_DP2),
    f32(4, *PP2_ZERO1),
    *(f32(4, *TP2_DP2, f"strategy.zero_stage={stage}") for stage in (1, 2, 3)),
    f32(4, *TP2_DP2, "strategy.offload_optimizer=true"),
    f32(2, "strategy=ds_zero3", "strategy.bucket_mb=0.05"),
]
