"""Data parallelism: DDP, FSDP2, both."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, checkpointed, row

ROWS = [
    *(row(size, f"strategy={name}", options=(p,)) for name in ("dp", "fsdp") for p in (F64, F32) for size in (1, 2, 4)),
    *(row(2, f"strategy={name}", options=(BF16,)) for name in ("dp", "fsdp")),
    *(row(2, f"strategy={name}", options=(F64, TIED)) for name in ("dp", "fsdp")),
    row(2, "strategy=fsdp", "strategy.reshard_after_forward=false"),
    row(4, "strategy=fsdp", "strategy.dp_replicate=2"),
    *checkpointed(2, "strategy=fsdp"),
    row(2, "strategy=dp", bug="accumulation_scale"),
    row(2, "strategy=dp", bug="rank_left_out"),
]
SLOW_ROWS = [row(2, f"strategy={name}", options=(F32, COMPILED)) for name in ("dp", "fsdp")]
