"""Inputs of layers in the host's memory, or on CPUs in other memory. The reference neither offloads nor recomputes."""

from tests.rows.base import BF16, COMPILED, F32, F64, TIED, Row, row

OFFLOADED = ("train.activation_checkpointing=full", "train.offload_activations=true")
MOE = "model=moe_tiny"

ROWS: list[Row] = [
    row(1, "strategy=single", *OFFLOADED),
    row(2, "strategy=fsdp", *OFFLOADED, options=(F64, TIED)),
    row(2, "strategy=tp", *OFFLOADED, "train.loss_chunks=3"),
    row(2, "strategy=dp", *OFFLOADED),
    row(2, "strategy=dp", *OFFLOADED, bug="input_of_the_layer_before"),
]
SLOW_ROWS: list[Row] = [
    row(2, "strategy=dp", *OFFLOADED, options=(BF16,)),
    row(2, "strategy=zero1", *OFFLOADED, options=(F32,)),
    row(2, "strategy=cp", "strategy.cp_method=ring", *OFFLOADED),
    row(2, "strategy=ep", *OFFLOADED, options=(F64, MOE, "model.balance=aux_loss")),
    row(2, "strategy=fsdp", *OFFLOADED, COMPILED, options=(F32,)),
    row(4, "strategy=fsdp_tp", *OFFLOADED, options=(F64, TIED)),
    row(4, "strategy=hsdp", *OFFLOADED),
]
