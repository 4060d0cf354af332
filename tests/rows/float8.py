"""Products of 8-bit numbers. On a CPU the same numbers are multiplied in float32."""

from tests.rows.base import COMPILED, FP8, Row, row

ROWWISE = (FP8, "train.fp8_scaling=rowwise")

ROWS: list[Row] = [
    row(2, "strategy=dp", options=(FP8,)),
    row(2, "strategy=fsdp", "train.activation_checkpointing=selective", options=ROWWISE),
    row(2, "strategy=cp", "strategy.cp_method=ring", options=(FP8,)),
    row(2, "strategy=pp", "strategy.schedule=zbv_zero_bubble", options=(FP8,)),
    row(2, "strategy=dp", options=(FP8,), bug="mean_of_means"),
]
SLOW_ROWS: list[Row] = [
    row(2, "strategy=fsdp", COMPILED, options=(FP8,)),  # it gathers weights in bf16; others cast them in the graph
    row(2, "strategy=ep", options=(FP8, "model=moe_tiny", "model.balance=bias")),
    row(4, "strategy=fsdp_cp", options=(FP8,)),
]
