"""Defines a row of the equivalence table."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from train.command import cli
from train.command.planning import auto
from train.config.plan import Plan
from train.config.schema import Config

BASE = ("model.num_layers=2", "train.seq_len=16", "train.micro_batch_size=1", "data.ignore_token=32")
COMPOSED = ("strategy", "model", "data", "optim", "hardware", "train.seq_len")  # presets, and what others interpolate
NUM_MICROBATCHES = 2  # where there is no pipeline: enough to go wrong between the first and the last
F32, F64, BF16, FP8 = (f"precision={name}" for name in ("float32", "float64", "bf16", "fp8"))
TIED = "model.tie_embeddings=true"
COMPILED = "compile.enabled=true"  # of the strategy alone: its reference on one device is not compiled


@dataclass(frozen=True)
class Row:
    """A config that must equal one device, on a world of `size` ranks.

    `strategy`: overrides only of this row. `options`: overrides of the row and of its reference on one device.
    `bug` names a planted bug, with which the row must fail.
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
        return self._of(self.size, *self.strategy)

    @property
    def reference(self) -> list[str]:
        """The overrides of the same work on one device."""
        return self._of(1, "strategy=single")

    def _of(self, size: int, *strategy: str) -> list[str]:
        """The microbatch size gives each data rank NUM_MICROBATCHES; in a pipeline it is one sequence."""
        words = [*BASE, *self._shape, *strategy, *self.options]
        if auto.asked(words):
            return [*laid_out(tuple(words), size)]
        plan = Plan(configured(words), size)
        if "pp" not in plan.axes and not any(word.startswith("train.micro_batch_size=") for word in self.strategy):
            rows, rest = divmod(plan.config.train.global_batch_size, NUM_MICROBATCHES * plan.data_ranks)
            words.append(f"train.micro_batch_size={1 if rest else rows}")
        return words

    @property
    def _shape(self) -> tuple[str, ...]:
        """As few layers and sequences as the layout needs. `options` may set others. A pipeline has four microbatches,
        and at least as many as a schedule with two stages on a rank has stages."""
        plan = Plan(configured(auto.stood_in([*BASE, *without_figures(self.strategy)])), self.size)
        batch = 4 if self.size < 4 else 8
        if "pp" in plan.axes:
            batch = min(batch, plan.data_ranks * max(4, 2 * plan.degrees["pp"]))
        return f"model.num_layers={max(plan.num_stages, 2)}", f"train.global_batch_size={batch}"


@cache
def laid_out(words: tuple[str, ...], size: int) -> tuple[str, ...]:
    """The words with the planner's layout in place of `strategy=auto`, and without the figures that it read."""
    return tuple(auto.in_place(without_figures(words), auto.choose(words, size, "cpu").words))


def without_figures(words: Sequence[str]) -> list[str]:
    """The words without those of a device, which only the planner reads."""
    return [word for word in words if not word.startswith("hardware")]


@cache
def _composed(*presets: str) -> Config:
    return cli.configured(presets)


def configured(overrides: Sequence[str]) -> Config:
    """The same as `cli.configured`, but faster: COMPOSED is composed once, and keys with plain values are set in it."""
    first = [word for word in overrides if word.partition("=")[0] in COMPOSED]
    return Plan(_composed(*first), 1).override(" ".join(word for word in overrides if word not in first)).config


def row(
    size: int,
    *strategy: str,
    options: tuple[str, ...] = (F64,),
    bug: str | None = None,
) -> Row:
    """A row, for example `row(2, "strategy=tp")`. It is float64 unless `options` names another precision."""
    return Row(size, tuple(strategy), options, bug)


def presets(*names: str, sizes: tuple[int, ...], single: int, options: tuple[str, ...] = ()) -> list[Row]:
    """Rows in float64 for every size, and in float32 only for the size `single`, because float32 rows rarely show an
    error that float64 rows do not."""
    rows = [row(size, f"strategy={name}", options=(F64, *options)) for name in names for size in sizes]
    return rows + [row(single, f"strategy={name}", options=(F32, *options)) for name in names]


def quickest(rows: Sequence[Row]) -> list[Row]:
    """The rows that `make test` runs: all of one and two ranks, and of more ranks the plainest one of each preset and
    method of context parallelism that has no smaller row."""
    plainest: dict[tuple[str, ...], Row] = {}
    for one in sorted(rows, key=lambda each: (each.size, len(each.strategy + each.options))):
        named = [word for word in one.strategy if word.startswith(("strategy=", "strategy.cp_method="))]
        plainest.setdefault(tuple(named), one)
    return [one for one in rows if one.size <= 2 or one in plainest.values()]


def checkpointed(size: int, *strategy: str) -> list[Row]:
    """A row for each kind of activation checkpointing. The reference does not recompute."""
    modes = ("full", "selective")
    return [row(size, *strategy, f"train.activation_checkpointing={mode}") for mode in modes]
