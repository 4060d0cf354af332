"""Context parallelism: three methods, alone and with the other axes."""

from tests.rows.base import BF16, COMPILED, F32, F64, row

METHODS = ("allgather", "ring", "ulysses")


def by(method: str) -> str:
    return f"strategy.cp_method={method}"


ROWS = [
    *(row(4, "strategy=cp", by(method)) for method in METHODS),
    row(2, "strategy=cp", by("ring")),
    row(2, "strategy=cp", by("ring"), options=(BF16,)),
    row(2, "strategy=cp", by("ring"), options=(F32,)),
    row(1, "strategy=cp", by("ring")),
    row(2, "strategy=cp", by("ring"), options=(F64, "train.activation_checkpointing=full")),
    row(4, "strategy=fsdp_cp"),
    row(4, "strategy=cp_tp", by("ring")),
    row(4, "strategy=dp", "strategy.cp=2", by("ulysses")),
    row(4, "strategy=pp", "strategy.pp=2", "strategy.cp=2", by("ring")),
    row(2, "strategy=cp", by("ring"), bug="rope_from_zero"),
    row(2, "strategy=cp", by("ring"), bug="merge_without_weights"),
    row(2, "strategy=cp", by("ring"), bug="backward_of_another_step"),
]
SLOW_ROWS = [
    *(row(2, "strategy=cp", by(method)) for method in METHODS if method != "ring"),
    *(row(2, "strategy=cp", by(method), options=(BF16,)) for method in METHODS if method != "ring"),
    *(row(2, "strategy=cp", by(method), COMPILED, options=(F32,)) for method in METHODS),
    row(2, "strategy=cp", by("allgather"), options=(F64, "train.activation_checkpointing=selective")),
    row(2, "strategy=cp", by("ring"), options=(F64, "model.attention=eager")),
    row(16, "strategy=4d", by("ring"), options=(F32,)),
]
