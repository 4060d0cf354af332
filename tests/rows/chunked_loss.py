"""The loss in chunks. The reference computes it at once."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, Row, row

MOE = "model=moe_tiny"
CHUNKS, UNEVEN = (f"train.loss_chunks={number}" for number in (4, 3))  # 3 divides no number of tokens here
ZERO_BUBBLE = "strategy.schedule=zbv_zero_bubble"

ROWS: list[Row] = [
    row(1, "strategy=single", UNEVEN),
    row(2, "strategy=dp", CHUNKS),
    row(2, "strategy=fsdp", UNEVEN, options=(BF16, TIED)),
    row(2, "strategy=tp", UNEVEN, options=(F64, "model.vocab_size=259")),
    row(2, "strategy=cp", "strategy.cp_method=ring", CHUNKS, options=(F32,)),
    row(2, "strategy=pp", UNEVEN),
    row(2, "strategy=pp", ZERO_BUBBLE, CHUNKS, options=(F64, TIED)),  # each half of a backward needs the gradients
    row(8, "strategy=3d", UNEVEN),
    row(2, "strategy=dp", CHUNKS, bug="mean_of_chunks"),
    row(2, "strategy=dp", CHUNKS, bug="incoming_gradient_ignored"),
]
SLOW_ROWS: list[Row] = [
    row(2, "strategy=dp", UNEVEN, options=(BF16,)),
    row(2, "strategy=fsdp", UNEVEN),
    row(2, "strategy=zero1", CHUNKS, options=(F32,)),
    row(2, "strategy=zero2", UNEVEN, options=(F64, TIED)),
    row(2, "strategy=tp", CHUNKS, "strategy.sequence_parallel=false", options=(F32, TIED)),
    row(2, "strategy=pp", "strategy.schedule=gpipe", CHUNKS, options=(F64, TIED)),
    row(2, "strategy=pp", "strategy.schedule=interleaved_zero_bubble", UNEVEN),
    row(2, "strategy=pp", "strategy.schedule=dualpipev", UNEVEN),
    row(2, "strategy=ep", CHUNKS, options=(F64, MOE, "model.balance=aux_loss")),
    row(2, "strategy=fsdp", UNEVEN, options=(F64, "train.qat=8da4w")),
    *(row(2, f"strategy={name}", CHUNKS, COMPILED, options=(F32,)) for name in ("fsdp", "tp", "pp")),
    row(4, "strategy=hsdp", CHUNKS),
    row(4, "strategy=dp_pp", CHUNKS),
    row(4, "strategy=fsdp_pp", CHUNKS, options=(F64, TIED)),
    row(4, "strategy=fsdp_tp", UNEVEN, options=(F64, TIED)),
    row(4, "strategy=fsdp_cp", CHUNKS),
    row(4, "strategy=cp_tp", "strategy.cp_method=ring", UNEVEN),
    row(4, "strategy=tp_pp", CHUNKS, options=(F64, TIED)),
    row(8, "strategy=moe_3d", UNEVEN, options=(F64, MOE)),
]
