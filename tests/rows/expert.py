"""Mixtures of experts under every kind of layout, and expert parallelism."""

from tests.rows.base import BF16, COMPILED, F32, F64, Row, row

MOE = "model=moe_tiny"
AUX = (F64, MOE, "model.balance=aux_loss", "model.aux_loss_coef=0.1")
BIAS = (F64, MOE, "model.balance=bias", "model.bias_update_rate=0.05")
FLOAT32 = (F32, *AUX[1:], "model.num_experts=4", "model.num_shared_experts=0")
ROUNDED = (BF16, *BIAS[1:])
# The gradient of a router is a small difference of the gates' gradients, which are rounded to bf16, under `tp` on every
# rank. With 16 tokens in a sequence, its error is 5.8e-2 under tp=2 with four layers; with 64, it is 1.6e-2.
LONGER = (*ROUNDED, "train.seq_len=64")

ROWS: list[Row] = [
    row(2, "strategy=dp", options=AUX),
    row(2, "strategy=fsdp", options=BIAS),
    row(2, "strategy=tp", options=AUX),
    row(2, "strategy=tp", "strategy.sequence_parallel=false", options=(*AUX, "model.score_function=softmax")),
    row(2, "strategy=pp", options=BIAS),
    row(1, "strategy=ep", options=BIAS),
    row(2, "strategy=ep", options=AUX),
    row(2, "strategy=ep", options=FLOAT32),
    row(2, "strategy=ep", options=ROUNDED),
    row(4, "strategy=ep", options=(*BIAS, "train.activation_checkpointing=full")),
    row(4, "strategy=ep", "strategy.ep=2", options=AUX),
    row(4, "strategy=ep", "strategy.ep=2", "strategy.tp=2", options=AUX),
    row(4, "strategy=ep", "strategy.dp_replicate=2", options=(*BIAS, "model.top_k=1")),
    row(2, "strategy=cp", options=AUX),
    row(8, "strategy=moe_3d", options=AUX),
    row(8, "strategy=moe_3d", "strategy.pp=1", options=FLOAT32),
    # over two efsdp ranks: alone, FSDP of torch 2.13 divides by its factor twice
    row(4, "strategy=ep", "strategy.ep=2", options=AUX, bug="expert_gradients_times_ep"),
    row(2, "strategy=ep", options=AUX, bug="aux_loss_of_local_sequences"),
    row(2, "strategy=tp", options=AUX, bug="aux_loss_on_every_tp_rank"),
    row(2, "strategy=ep", options=ROUNDED, bug="first_expert_ranked_higher"),
]
# the experts' uneven splits break the graph: what is compiled is the rest of the block
SLOW_ROWS: list[Row] = [
    row(2, "strategy=ep", COMPILED, options=BIAS),
    row(2, "strategy=ep", COMPILED, "train.activation_checkpointing=full", options=BIAS),
    row(2, "strategy=fsdp", COMPILED, "train.activation_checkpointing=selective", options=BIAS),
    row(4, "strategy=ep", "strategy.cp=2", options=AUX),
    row(2, "strategy=cp", options=ROUNDED),
    row(4, "strategy=ep", options=ROUNDED),
    # recomputed in backwards that run in another order than the forwards
    row(4, "strategy=tp_pp", "strategy.schedule=looped_bfs", "train.activation_checkpointing=full", options=LONGER),
]
