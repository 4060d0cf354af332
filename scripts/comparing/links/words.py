"""The results of launch.netlab in words: tables for a terminal or in Markdown, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from launch.planning.answer import aligned
from scripts.comparing.links.reading import Results, Row, crossings, pairs, speed_of

MiB = 2**20
HEAD = ("links", "run", "crosses hosts", "predicted ms", "measured ms", "error", "explained ms", "error", "tokens/s",
        "sent MiB", "predicted MiB")  # fmt: skip
NOTES = (
    "predicted: before the first run; measured: the median step; explained: the computation that the run measured "
    "itself, and the predicted messages",
    "sent: bytes of a step over the link of the host that sends most, counted by its interface, with headers, "
    "validation and the start; predicted: those of the strategy's messages alone",
)


def table(results: Results, *, markdown: bool = False) -> list[str]:
    """The runs; nothing if there is none."""
    return _shown(cells(results), markdown, left=(0, 1, 2)) if results.rows else []


def messages(results: Results, *, markdown: bool = False) -> list[str]:
    """The messages on the shaped links; nothing if none was measured."""
    return _shown(message_cells(results), markdown, left=(0, 1)) if results.messages else []


def cells(results: Results) -> list[list[str]]:
    return [[*HEAD], *([*_cells(row)] for speed in results.speeds for row in results.at(speed))]


def message_cells(results: Results) -> list[list[str]]:
    rows = [["links", "operation", "bytes", "ms", "limit ms", "of the limit"]]
    for one in results.messages:
        share = f"{one.limit_us / one.us:.1%}"
        numbers = [f"{one.bytes:,}", f"{one.us / 1e3:,.3f}", f"{one.limit_us / 1e3:,.3f}", share]
        rows.append([speed_of(one.inter), one.op, *numbers])
    return rows


def summary(results: Results) -> Iterator[str]:
    """What the picture shows: the order of the strategies, and where it changes."""
    found = pairs(results)
    if found.count:
        yield (
            f"{found.apart} of {found.count} pairs of runs at the same speed differ by more than 10 %, and "
            f"{found.right} of these {found.apart} are in the order that was predicted"
            + (f"; not {', '.join(found.wrong)}" if found.wrong else "")
        )
    errors = [abs(error) for row in results.rows if (error := row.error(row.explained_ms)) is not None]
    if errors:
        yield f"steps are explained within {max(errors):.1%} of what was measured, on average {_mean(errors):.1%}"
    errors = [abs(error) for row in results.rows if (error := row.error(row.predicted_ms)) is not None]
    if errors:
        yield f"steps are predicted within {max(errors):.1%}, on average {_mean(errors):.1%}"
    for one in crossings(results):
        said = "predicted" if one.predicted else "measured"
        yield f"{one.first} and {one.second} are equally fast at {one.speed / 1e6:,.0f} Mbit/s ({said})"
    yield from _placements(results)


def _placements(results: Results) -> Iterator[str]:
    """What the order of axes changes, by the bytes that cross hosts."""
    for speed in results.speeds:
        by_strategy: dict[str, list[Row]] = {}
        for row in results.at(speed):
            if " order=" in row.label and row.measured_ms is not None:
                by_strategy.setdefault(row.strategy, []).append(row)
        for rows in by_strategy.values():
            best, *others = sorted(rows, key=lambda row: row.measured_ms or 0.0)
            for other in others:
                assert best.measured_ms is not None and other.measured_ms is not None
                yield (
                    f"{speed_of(speed)}: {best.label} is {other.measured_ms / best.measured_ms:.2f} times as fast as "
                    f"{other.label}, as {_crossing(best)} and not {_crossing(other)} cross hosts"
                )


def _crossing(row: Row) -> str:
    return f"{row.predicted_sent / MiB:,.2f} MiB a step ({', '.join(row.crossing) or 'nothing'})"


def _cells(row: Row) -> Iterator[str]:
    yield from (speed_of(row.inter), row.label, ", ".join(row.crossing) or "-", f"{row.predicted_ms:,.1f}")
    yield row.status if row.measured_ms is None else f"{row.measured_ms:,.1f}"
    yield _percent(row.error(row.predicted_ms))
    yield "-" if row.explained_ms is None else f"{row.explained_ms:,.1f}"
    yield _percent(row.error(row.explained_ms))
    yield "-" if row.tokens is None else f"{row.tokens:,.0f}"
    yield "-" if row.sent is None else f"{row.sent / MiB:,.2f}"
    yield f"{row.predicted_sent / MiB:,.2f}"


def _shown(rows: Sequence[Sequence[str]], markdown: bool, left: tuple[int, ...]) -> list[str]:
    if not markdown:
        return aligned(rows, left)
    ruler = "|" + "|".join("---" if i in left else "---:" for i in range(len(rows[0]))) + "|"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], ruler, *lines[1:]]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
