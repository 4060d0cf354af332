"""The table of compressed runs: their losses, bytes and speeds beside the parent's, and which are on the Pareto front.

Runs of the same model on the same text, measured on the same kind of device, are in one table. Those that differ only
in the seed of their parent are one row, with the mean and, for the cost, the smallest and the largest. Torch is not
imported.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.compressing.record import Record, Side, is_compressed
from train.config.problems import BadInput
from train.record.run_files import clean, entries
from train.record.run_folder import flat

MiB = 2**20
PARENT = "parent, float32"
PIPED_WIDTH = 150
DEEPEST = 3  # levels of folders below a named one
METHOD = (
    "cost: the loss against the parent's or, where the method trains, against that of the parent trained on by as many "
    "steps with the same data and rate; with several seeds the mean, the smallest and the largest. disk: "
    "weights.safetensors. memory: the tensors of the opened model. Speeds are of one sequence; x: against the parent, "
    "in turns in one process. front: the Pareto front; no other row has fewer bytes on the disk without a larger loss, "
    "nor a smaller loss without more bytes, where 0.1 % of the parent's bytes counts as none."
)


@dataclass(frozen=True)
class Row:
    """The runs of one method. `sides`: what was measured of each. `parents`: the same of their parents. `costs`: in
    %."""

    label: str
    sides: tuple[Side, ...]
    parents: tuple[Side, ...]
    costs: tuple[float, ...] = ()
    front: bool = False

    def mean(self, figure: str) -> float | None:
        return _mean([getattr(side, figure) for side in self.sides])

    def ratio(self, figure: str) -> float | None:
        """The mean of how many times the parent's figure it has."""
        pairs = zip(self.sides, self.parents, strict=True)
        both = [(getattr(mine, figure), getattr(theirs, figure)) for mine, theirs in pairs]
        return _mean([None if mine is None or theirs is None else mine / theirs for mine, theirs in both])


@dataclass(frozen=True)
class Table:
    heading: str
    rows: tuple[Row, ...]


def find(paths: Iterable[Path]) -> tuple[list[Path], list[str]]:
    """The compressed runs that are named, and those below named folders. `notes`: what was not there."""
    found: list[Path] = []
    notes = []
    for path in paths:
        below = list(_below(path, DEEPEST))
        found += below
        notes += [] if below else [f"{clean(path)}: no compressed run"]
    return list(dict.fromkeys(found)), notes


def read_all(paths: Iterable[Path]) -> tuple[list[Record], list[str]]:
    """The records of compressed runs, and a line for each that cannot be read."""
    records, notes = [], []
    for path in paths:
        try:
            records.append(Record.read(path))
        except BadInput as error:
            notes.append(f"skipped: {clean(error.problems[0].message)}")
    return records, notes


def tables(records: Sequence[Record]) -> list[Table]:
    """One table for each model, text and device, with its rows from the most bytes to the fewest."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(_heading(record), []).append(record)
    return [Table(heading, _with_front(_rows(same))) for heading, same in groups.items()]


def _below(path: Path, depth: int) -> Iterable[Path]:
    if is_compressed(path):
        yield path
    elif depth:
        for child in entries(path):
            if child.is_dir() and not child.is_symlink():
                yield from _below(child, depth - 1)


def _heading(record: Record) -> str:
    work, where = flat(record.work), record.environment
    shape = f"{work.get('model.name')}, {work.get('model.dim')} wide, vocabulary {work.get('model.vocab_size')}"
    text = f"{work.get('data.source')} {str(work.get('data.corpus_sha256'))[:8]}"
    text += f", train.seq_len={work.get('train.seq_len')}"
    threads = f", {where.get('omp_threads')} thread(s)" if where.get("device") == "cpu" else ""
    return clean(f"{shape}; {text}; on {where.get('device')}{threads}, torch {where.get('torch')}")


def _rows(records: Sequence[Record]) -> list[Row]:
    of_parents: dict[Any, list[Side]] = {}
    for record in records:
        of_parents.setdefault(record.parent.get("sha256"), []).append(record.before)
    parents = {parent: _median(measured) for parent, measured in of_parents.items()}
    by_label: dict[str, list[Record]] = {}
    for record in records:
        by_label.setdefault(clean(record.label), []).append(record)
    rows = [Row(PARENT, (*parents.values(),), (*parents.values(),))]
    for name, same in by_label.items():
        sides, before = (tuple(getattr(record, side) for record in same) for side in ("after", "before"))
        rows.append(Row(name, sides, before, tuple(record.cost_pct for record in same)))
    return sorted(rows, key=lambda row: (-(row.mean("bytes") or 0), row.mean("loss") or 0))


def _median(measured: Sequence[Side]) -> Side:
    """What was measured of one parent, each time beside another method: the medians of its speeds."""

    def median(figure: str) -> float | None:
        known = [value for side in measured if (value := getattr(side, figure)) is not None]
        return statistics.median(known) if known else None

    return dataclasses.replace(
        measured[0],
        prefill_tokens_per_s=median("prefill_tokens_per_s"),
        decode_tokens_per_s=median("decode_tokens_per_s"),
    )


def _with_front(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows, with `front` where no other row is at least as good in both and better in one."""
    places = [(round(row.ratio("bytes") or 0.0, 3), row.mean("loss") or 0.0) for row in rows]
    worse = [any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in places) for p in places]
    return tuple(dataclasses.replace(row, front=not beaten) for row, beaten in zip(rows, worse, strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _cost(row: Row) -> str:
    if not row.costs:
        return "-"
    ends = f" ({min(row.costs):+.2f} … {max(row.costs):+.2f})" if len(row.costs) > 1 else ""
    return f"{sum(row.costs) / len(row.costs):+.2f} %{ends}"


def _mib(figure: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        return f"{(row.mean(figure) or 0) / MiB:,.2f} ({100 * (row.ratio(figure) or 0):.1f} %)"

    return text


def _speed(figure: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        speed, ratio = row.mean(figure), row.ratio(figure)
        return "-" if speed is None or ratio is None else f"{speed:,.0f} ({ratio:.2f} x)"

    return text


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row.label,
    "runs": lambda row: str(len(row.sides)),
    "validation loss": lambda row: f"{row.mean('loss'):.4f}",
    "cost": _cost,
    "disk MiB (of fp32)": _mib("bytes"),
    "memory MiB": lambda row: f"{(row.mean('resident_bytes') or 0) / MiB:,.2f}",
    "prefill tokens/s": _speed("prefill_tokens_per_s"),
    "decode tokens/s": _speed("decode_tokens_per_s"),
    "front": lambda row: "yes" if row.front else "",
}


def to_terminal(found: Sequence[Table]) -> None:
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    for table in found:
        console.print(f"\n{table.heading}", style="bold")
        drawn = Drawn()
        for title in COLUMNS:
            drawn.add_column(title, justify="left" if title in ("method", "front") else "right")
        for row in table.rows:
            drawn.add_row(*(text(row) for text in COLUMNS.values()))
        console.print(drawn)
    console.print(f"\n{METHOD}")


def to_markdown(found: Sequence[Table]) -> str:
    blocks = []
    for table in found:
        lines = [[*COLUMNS], ["---" if title in ("method", "front") else "---:" for title in COLUMNS]]
        lines += [[text(row).replace("|", "\\|") for text in COLUMNS.values()] for row in table.rows]
        blocks.append("\n".join([f"### {table.heading}", "", *(f"| {' | '.join(cells)} |" for cells in lines)]))
    return "\n\n".join([*blocks, METHOD]) + "\n"


def to_json(found: Sequence[Table]) -> str:
    """Every row with all figures at full precision."""
    return json.dumps([_values(table, row) for table in found for row in table.rows], indent=2) + "\n"


def _values(table: Table, row: Row) -> dict[str, Any]:
    figures = ("loss", "bytes", "resident_bytes", "prefill_tokens_per_s", "decode_tokens_per_s")
    means = {figure: row.mean(figure) for figure in figures}
    ratios = {f"{figure}_of_parent": row.ratio(figure) for figure in figures}
    losses = [side.loss for side in row.sides]
    return {
        "table": table.heading,
        "method": row.label,
        "runs": len(row.sides),
        **means,
        **ratios,
        "losses": losses,
        "costs_pct": [*row.costs],
        "front": row.front,
    }
