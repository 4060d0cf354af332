"""What a row of the equivalence table is."""

from dataclasses import dataclass

BASE = ("model.num_layers=4", "train.seq_len=32", "train.micro_batch_size=1", "data.ignore_token=32")
F32, F64, BF16 = "precision=float32", "precision=float64", "precision=bf16"
TIED = "model.tie_embeddings=true"
COMPILED = "compile.enabled=true"


@dataclass(frozen=True)
class Row:
    """A config that must equal one device, on a world of `size` ranks.

    `strategy`: overrides of this row alone; `options`: overrides of the row and of its single-device reference.
    `bug` names a planted bug; then the row must be red.
    """

    size: int
    strategy: tuple[str, ...]
    options: tuple[str, ...] = ()
    bug: str | None = None

    @property
    def name(self) -> str:
        words = [word.removeprefix("strategy.").removeprefix("strategy=") for word in (*self.strategy, *self.options)]
        return " ".join([*words, f"ws{self.size}"] + ([f"BUG:{self.bug}"] if self.bug else []))

    @property
    def overrides(self) -> list[str]:
        return [*BASE, *self.strategy, *self.options]

    @property
    def reference(self) -> list[str]:
        """The same work on one device."""
        return [*BASE, "strategy=single", *self.options]


def row(
    size: int,
    *strategy: str,
    options: tuple[str, ...] = (F64,),
    bug: str | None = None,
) -> Row:
    """`row(2, "strategy=tp")`: float64 unless `options` says otherwise."""
    return Row(size, tuple(strategy), options, bug)


def presets(*names: str, sizes: tuple[int, ...], single: int) -> list[Row]:
    """float64 at every size; float32, which could hide little that float64 shows, at the size `single` alone."""
    rows = [row(size, f"strategy={name}") for name in names for size in sizes]
    return rows + [row(single, f"strategy={name}", options=(F32,)) for name in names]


def checkpointed(size: int, *strategy: str) -> list[Row]:
    """With each kind of activation checkpointing."""
    modes = ("full", "selective")
    return [row(size, *strategy, options=(F64, f"train.activation_checkpointing={mode}")) for mode in modes]
