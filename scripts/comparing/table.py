"""The table of a comparison: its columns, how values are written, the order of rows, and the output formats."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.comparing.gate import Group, Row

METHOD = (
    "tokens/s: median after warm-up without sampled steps, and its 95 % interval by binomial order statistics (none "
    "under 6 steps). sent: bytes of messages. equal: the largest relative difference of the training loss "
    "from the reference row in the first 20 steps. A dash means: not measured. See docs/reading-the-numbers.md."
)
MORE_IS_BETTER = {
    "tokens_per_s",
    "tokens_per_s_ci95_low",
    "tokens_per_s_ci95_high",
    "tokens_per_s_per_device",
    "mfu_pct",
}
PIPED_WIDTH = 150


@dataclass(frozen=True)
class Column:
    """`key`: the figure in the column. `rated`: the best row is marked. `optional`: the column is left out if no row
    has the figure."""

    title: str
    text: Callable[[Row], str]
    key: str = ""
    rated: bool = False
    optional: bool = False


def formatted(value: float | None, decimals: int | None = None) -> str:
    """The value with this many decimals or, by default, with about three significant digits; - if unknown."""
    if value is None:
        return "-"
    if decimals is None:
        decimals = next(
            (d for d, least in enumerate((100, 10, 1, 0.1, 0.01)) if abs(value) >= least), 5 if value else 0
        )
    return f"{value:,.{decimals}f}"


def _speed(row: Row) -> str:
    low, high = row.figures["tokens_per_s_ci95_low"], row.figures["tokens_per_s_ci95_high"]
    interval = "" if low is None else f" ({formatted(low)} to {formatted(high)})"
    return formatted(row.figures["tokens_per_s"]) + interval


def _duration(row: Row) -> str:
    p50, p95 = row.figures["step_ms_p50"], row.figures["step_ms_p95"]
    return "-" if p50 is None else f"{formatted(p50)} / {formatted(p95)}"


def _loss(row: Row) -> str:
    return formatted(row.figures["validation_loss"], 10 if row.run.precision == "float64" else 6)


def _plain(title: str, key: str, decimals: int | None = None, *, rated: bool = True, optional: bool = False) -> Column:
    return Column(title, lambda row: formatted(row.figures[key], decimals), key, rated, optional)


COLUMNS = [
    Column("strategy", lambda row: row.run.label),
    Column("degrees", lambda row: row.run.degrees or "-"),
    _plain("world", "world", 0, rated=False),
    Column("tokens/s", _speed, "tokens_per_s", rated=True),
    _plain("tokens/s per device", "tokens_per_s_per_device"),
    Column("step ms p50 / p95", _duration, "step_ms_p50", rated=True),
    _plain("MFU %", "mfu_pct", 1, optional=True),
    _plain("memory MiB", "memory_mib"),
    _plain("resident MiB", "resident_mib", 0, rated=False, optional=True),
    _plain("sent MiB per step by rank 0", "sent_mib_per_step"),
    _plain("exposed comm %", "exposed_comm_pct", 1, rated=False),
    _plain("bubble %", "bubble_pct", 1, rated=False),
    _plain("J per step", "joules_per_step", optional=True),
    _plain("$ per M tokens", "usd_per_million_tokens", optional=True),
    Column("validation loss", _loss, "validation_loss"),
    Column("equal", lambda row: row.equal),
]


def columns_of(group: Group) -> list[Column]:
    """All columns, except optional ones for which no row has a figure."""
    return [c for c in COLUMNS if not c.optional or any(row.figures[c.key] is not None for row in group.rows)]


def sortable(groups: list[Group]) -> list[str]:
    """The names that --sort accepts: all figures, also those that are only in --csv and --json."""
    return list(dict.fromkeys(name for group in groups for row in group.rows for name in row.figures))


def sort(groups: list[Group], key: str) -> None:
    """Sort the rows by this figure, the best first (the largest or the smallest, depending on the figure). Rows without
    the figure are last."""
    sign = -1 if key in MORE_IS_BETTER else 1

    def place(row: Row) -> tuple[bool, float]:
        value = row.figures.get(key)
        return value is None, sign * (value or 0.0)

    for group in groups:
        group.rows.sort(key=place)


def best(group: Group, key: str) -> Row | None:
    """The best row by this figure, among the rows that have it and whose loss does not differ. None if there are fewer
    than two of them."""
    known = [row for row in group.rows if row.good and row.figures.get(key) is not None]
    if len(known) < 2:
        return None
    choose = max if key in MORE_IS_BETTER else min
    return choose(known, key=lambda row: row.figures[key] or 0.0)


def notes_of(group: Group) -> list[str]:
    """What a reader must know to understand the table of the group."""
    memory = [f"memory MiB: {group.memory}, of the largest rank"] if group.memory else []
    resident = any(row.figures["resident_mib"] is not None for row in group.rows)
    whole = ["resident MiB: all memory of the process, including Python and torch"] if resident else []
    return [*memory, *whole, *group.notes]


def to_terminal(groups: list[Group]) -> None:
    """Print each group. A table wider than the terminal is continued below, with the strategies repeated."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, markup=False)
    for group in groups:
        console.print(f"\n{group.heading}", style="bold")
        first, *others = columns_of(group)
        for part in _packed(group, first, others, console.width):
            table = Table()
            for column in [first, *part]:
                right = bool(column.key)
                table.add_column(column.title, justify="right" if right else "left", no_wrap=column.title != "equal")
            for row in group.rows:
                table.add_row(*(column.text(row) for column in [first, *part]))
            console.print(table)
        for note in notes_of(group):
            console.print(f"  {note}")
    console.print(f"\n{METHOD}")


def _packed(group: Group, first: Column, others: list[Column], width: int) -> list[list[Column]]:
    """Divide the columns into as few tables as possible, each with the first column, which fit into the width."""

    def needs(column: Column) -> int:
        return 3 + max(len(text) for text in [column.title, *(column.text(row) for row in group.rows)])

    parts: list[list[Column]] = [[]]
    for column in others:
        if parts[-1] and 1 + sum(map(needs, [first, *parts[-1], column])) > width:
            parts.append([])
        parts[-1].append(column)
    return parts


def to_markdown(groups: list[Group]) -> str:
    """Markdown tables under headings, to paste into a README."""
    blocks = []
    for group in groups:
        columns = columns_of(group)
        rows = [[c.title for c in columns], ["---:" if c.key else "---" for c in columns]]
        rows += [[c.text(row).replace("|", "\\|") for c in columns] for row in group.rows]
        lines = [f"| {' | '.join(cells)} |" for cells in rows]
        blocks.append("\n".join([f"### {group.heading}", "", *lines, "", *(f"- {note}" for note in notes_of(group))]))
    return "\n\n".join([*blocks, METHOD]) + "\n"


def records(groups: list[Group]) -> list[dict[str, Any]]:
    """One flat record for each run, with all figures at full precision. An unknown figure is None."""
    names = sortable(groups)
    return [
        {
            "run": str(row.run.path),
            "label": row.run.label,
            "strategy": row.run.strategy,
            "degrees": row.run.degrees or None,
            "status": row.run.status,
            "work_hash": row.run.facts.get("work_hash"),
            "table": group.heading,
            "equal": row.equal,
            "memory_is": group.memory or None,
            **{name: row.figures.get(name) for name in names},
        }
        for group in groups
        for row in group.rows
    ]


def to_json(groups: list[Group]) -> str:
    return json.dumps(records(groups), indent=2, allow_nan=False) + "\n"


def to_csv(groups: list[Group]) -> str:
    """A header and one line for each run; - marks an unknown figure."""
    out, rows = io.StringIO(), records(groups)
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: "-" if value is None else value for name, value in row.items()} for row in rows)
    return out.getvalue()
