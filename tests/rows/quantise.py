"""Quantisation-aware training. It is proven in float64: in fewer digits, two right sums can be rounded to two steps."""

from tests.rows.base import F64, TIED, Row, row

QAT = (F64, "train.qat=8da4w")

ROWS: list[Row] = [
    row(2, "strategy=dp", options=QAT),
    row(2, "strategy=fsdp", "train.activation_checkpointing=full", options=(*QAT, TIED)),
    row(2, "strategy=cp", "strategy.cp_method=ring", options=QAT),
    row(2, "strategy=pp", "strategy.schedule=zbv_zero_bubble", options=QAT),
    row(2, "strategy=ep", options=(*QAT, "model=moe_tiny", "model.expert_ffn_dim=64", "model.balance=aux_loss")),
    row(2, "strategy=dp", options=QAT, bug="range_of_own_rows"),
]
SLOW_ROWS: list[Row] = [
    row(4, "strategy=hsdp", options=QAT),
    row(4, "strategy=fsdp_pp", options=(*QAT, TIED)),
    row(4, "strategy=fsdp_cp", options=QAT),
]
