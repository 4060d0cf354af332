"""Products of axes: presets, and some that no preset names."""

from tests.rows.base import F32, F64, Row, row

ROWS = [
    *(row(4, f"strategy={name}", options=(p,)) for name in ("fsdp_tp", "tp_pp", "dp_pp") for p in (F64, F32)),
    *(row(8, "strategy=3d", options=(p,)) for p in (F64, F32)),
    row(4, "strategy=tp_pp", "strategy.loss_parallel=false", "strategy.sequence_parallel=false"),
    row(4, "strategy=pp", "strategy.pp=2", "strategy.dp_shard=2"),
    row(8, "strategy=3d", "strategy.schedule=gpipe", "strategy.sequence_parallel=false"),
    row(8, "strategy=fsdp_tp", "strategy.dp_replicate=2"),
]
SLOW_ROWS: list[Row] = []
