"""Tensor and sequence parallelism."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, checkpointed, row

ROWS = [
    *(row(size, "strategy=tp", options=(p,)) for p in (F64, F32) for size in (1, 2, 4)),
    row(2, "strategy=tp", options=(BF16,)),
    row(2, "strategy=tp", options=(F64, TIED)),
    row(2, "strategy=tp", "strategy.sequence_parallel=false"),
    row(2, "strategy=tp", "strategy.loss_parallel=false"),
    row(2, "strategy=tp", options=(F64, "model.attention=eager")),
    *checkpointed(2, "strategy=tp"),
    row(2, "strategy=tp", bug="norm_gradient_not_summed"),
]
SLOW_ROWS = [
    row(2, "strategy=tp", options=(F32, COMPILED)),
    row(2, "strategy=tp", options=(F32, COMPILED, "train.activation_checkpointing=selective")),
]
