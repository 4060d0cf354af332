"""Pipelines alone."""

from tests.rows.base import BF16, COMPILED, F32, F64, checkpointed, row

ROWS = [
    *(row(size, "strategy=pp", options=(p,)) for p in (F64, F32) for size in (1, 2, 4)),
    row(2, "strategy=pp", options=(BF16,)),
    row(2, "strategy=pp", "strategy.schedule=gpipe"),
    *checkpointed(2, "strategy=pp"),
]
SLOW_ROWS = [row(2, "strategy=pp", options=(F32, COMPILED))]
