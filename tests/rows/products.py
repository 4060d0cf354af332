"""Products of axes: presets, and some that no preset names."""

from tests.rows.base import BF16, F64, TIED, Row, presets, row

ROWS = [
    *presets("fsdp_tp", "tp_pp", "dp_pp", sizes=(4,), single=4),
    row(8, "strategy=3d"),
    row(4, "strategy=tp_pp", "strategy.loss_parallel=false", "strategy.sequence_parallel=false"),
    row(4, "strategy=fsdp_pp"),
    row(4, "strategy=fsdp_pp", "strategy.schedule=zbv_zero_bubble", options=(F64, TIED)),
    row(4, "strategy=tp_pp", "strategy.schedule=zbv_zero_bubble"),
    row(4, "strategy=tp_pp", options=(F64, TIED)),
    row(4, "strategy=tp_pp", "train.micro_batch_size=2"),  # whole sequences go from stage to stage
    row(4, "strategy=fsdp_tp", "train.micro_batch_size=1"),
    row(8, "strategy=3d", "strategy.schedule=gpipe", "strategy.sequence_parallel=false"),
    row(8, "strategy=fsdp_tp", "strategy.dp_replicate=2"),
]
# every schedule with every kind of the other axes, of recomputation and of ends is in pairwise.py
SLOW_ROWS: list[Row] = [
    row(4, "strategy=tp_pp", options=(F64, "model.vocab_size=259")),
    row(4, "strategy=dp_pp", "strategy.schedule=interleaved_1f1b"),
    row(
        2,
        "strategy=pp",
        "strategy.pp=1",
        "strategy.dp_replicate=2",
        "strategy.schedule=looped_bfs",
        options=(F64, TIED),
    ),
    row(4, "strategy=fsdp_pp", "strategy.reshard_after_forward=true"),
    row(4, "strategy=fsdp_pp", "strategy.schedule=dualpipev", options=(BF16, TIED)),
    row(4, "strategy=fsdp_pp", "strategy.cpu_offload=true", options=(F64, TIED)),
]
