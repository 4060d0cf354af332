"""The equivalence table: each row is a config that must equal one device, on a world of the given size.

All rows train four layers on real text, with accumulation, and with a masked token (the space), so that ranks and
microbatches have unequal numbers of valid tokens.
"""

from dataclasses import dataclass

BASE = ("model.num_layers=4", "train.seq_len=32", "train.micro_batch_size=1", "data.ignore_token=32")


@dataclass(frozen=True)
class Row:
    """`bug` names a planted bug; then the row must be red."""

    size: int
    strategy: tuple[str, ...]
    options: tuple[str, ...] = ()
    bug: str | None = None

    @property
    def name(self) -> str:
        words = [word.removeprefix("strategy.").removeprefix("strategy=") for word in (*self.strategy, *self.options)]
        return " ".join([*words, f"@{self.size}"] + ([f"BUG:{self.bug}"] if self.bug else []))

    @property
    def overrides(self) -> list[str]:
        return [*BASE, *self.strategy, *self.options]

    @property
    def reference(self) -> list[str]:
        """The same work on one device."""
        return [*BASE, "strategy=single", *self.options]


F32, F64, BF16 = "precision=float32", "precision=float64", "precision=bf16"
TIED = "model.tie_embeddings=true"


def _rows() -> list[Row]:
    def row(size: int, *strategy: str, options: tuple[str, ...] = (F64,), bug: str | None = None) -> Row:
        return Row(size, tuple(strategy), options, bug)

    rows = []
    for precision in (F64, F32):
        o = (precision,)
        for name in ("dp", "fsdp", "tp", "pp"):
            rows += [row(size, f"strategy={name}", options=o) for size in (2, 4)]
        rows += [row(4, f"strategy={name}", options=o) for name in ("fsdp_tp", "tp_pp", "dp_pp")]
        rows += [row(8, "strategy=3d", options=o)]
        rows += [row(1, f"strategy={name}", options=o) for name in ("dp", "fsdp", "tp", "pp")]
    rows += [row(2, f"strategy={name}", options=(BF16,)) for name in ("dp", "fsdp", "tp", "pp")]
    rows += [
        row(2, "strategy=tp", "strategy.sequence_parallel=false"),
        row(2, "strategy=tp", "strategy.loss_parallel=false"),
        row(4, "strategy=tp_pp", "strategy.loss_parallel=false", "strategy.sequence_parallel=false"),
        row(2, "strategy=pp", "strategy.schedule=gpipe"),
        row(2, "strategy=fsdp", "strategy.reshard_after_forward=false"),
        row(4, "strategy=fsdp", "strategy.dp_replicate=2"),
        row(4, "strategy=pp", "strategy.pp=2", "strategy.dp_shard=2"),
        row(8, "strategy=3d", "strategy.schedule=gpipe", "strategy.sequence_parallel=false"),
        row(8, "strategy=fsdp_tp", "strategy.dp_replicate=2"),
    ]
    for name in ("dp", "fsdp", "tp"):
        rows.append(row(2, f"strategy={name}", options=(F64, TIED)))
    for name in ("fsdp", "tp", "pp"):
        rows.append(row(2, f"strategy={name}", options=(F64, "train.activation_checkpointing=full")))
        rows.append(row(2, f"strategy={name}", options=(F64, "train.activation_checkpointing=selective")))
    rows.append(row(2, "strategy=tp", options=(F64, "model.attention=eager")))
    rows += [
        row(2, "strategy=dp", bug="accumulation_scale"),
        row(2, "strategy=tp", bug="norm_gradient_not_summed"),
        row(2, "strategy=dp", bug="rank_left_out"),
    ]
    return rows


ROWS = _rows()
COMPILED = "compile.enabled=true"
SLOW_ROWS = [
    *(Row(2, (f"strategy={name}",), (F32, COMPILED)) for name in ("dp", "fsdp", "tp", "pp")),
    Row(2, ("strategy=tp",), (F32, COMPILED, "train.activation_checkpointing=selective")),
]
