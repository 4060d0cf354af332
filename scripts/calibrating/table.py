"""What scripts/matmul.py prints. Torch is not imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from scripts.calibrating.profile_file import Known
from train.command.planning.profile import OF_ACTIVATIONS, OPS, Tables

HEAD = ("", "measured", "", "% of data sheet", "US$ per PFLOP", "times the baseline")
NO_VALUE = ""
SHOWN_LEFT_OUT = 5


def lines(known: Known, before: Known | None) -> list[str]:
    rows = [HEAD, *_rates(known, before), *_messages(known, before)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    shown = []
    for row in rows:
        cells = [
            f"{row[0]:<{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        shown.append("  ".join(cells).rstrip())
    return shown


def best(tables: Tables, name: str, column: int = -1) -> float | None:
    """The highest rate of a table, or the bandwidth of its largest size, as small ones stay in a cache; None if it was
    not measured."""
    rows = tables.get(name)
    if not rows:
        return None
    of_rates = name.startswith(("products", "attention"))
    return max(row[column] for row in rows) if of_rates else max(rows, key=lambda row: row[0])[column]


def dollars_per_pflop(usd_per_hour: float, tflops: float) -> float:
    """What 10^15 operations cost at a rate in TFLOP/s."""
    return usd_per_hour / 3600 / (tflops / 1e3)


def _rates(known: Known, before: Known | None) -> Iterator[tuple[str, ...]]:
    price = known.published.price_usd_per_hour
    for name in known.tables:
        kind, _, precision = name.partition("_")
        rate = best(known.tables, name)
        assert rate is not None
        other = best(before.tables, name) if before else None
        if kind == "products":
            peak = known.published.peak_tflops.get(precision)
            cost = NO_VALUE if price is None else f"{dollars_per_pflop(price, rate):.3g}"
            yield f"products, {precision}", f"{rate:,.2f}", "TFLOP/s", _share(rate, peak), cost, _ratio(rate, other)
        elif kind == "attention":
            forward = best(known.tables, name, -2)
            before_forward = best(before.tables, name, -2) if before else None
            assert forward is not None
            yield (f"attention, {precision}, forward", f"{forward:,.2f}", "TFLOP/s",
                   _share(forward, known.published.peak_tflops.get(precision)), NO_VALUE,
                   _ratio(forward, before_forward))  # fmt: skip
        elif kind in ("copy", "optimiser", "layer", "loss"):
            words = {"copy": "copy of memory", "layer": "elementwise work of a layer"}.get(kind, kind)
            said = ", ".join([words, *precision.split("_")] if precision else [words])
            # bytes of a layer and of the loss are those of eager code, of which compiled code moves a part only
            share = _share(rate, known.published.memory_gb_per_s) if kind in ("copy", "optimiser") else NO_VALUE
            yield said, f"{rate:,.2f}", "GB/s", share, NO_VALUE, _ratio(rate, other)


def _messages(known: Known, before: Known | None) -> Iterator[tuple[str, ...]]:
    """Latency of the smallest message and bandwidth of the largest: alpha and beta of the alpha-beta model."""
    for name, rows in known.tables.items():
        op = next((op for op in (*OPS, *OF_ACTIVATIONS) if name.startswith(f"{op}_")), None)
        if op is None:
            continue
        for ranks in sorted({row[0] for row in rows}):
            same = sorted([*row[1:]] for row in rows if row[0] == ranks)
            others = sorted([*row[1:]] for row in (before.tables.get(name, ()) if before else ()) if row[0] == ranks)
            said = f"{op}, {name.removeprefix(f'{op}_')}, {ranks:g} ranks"
            rate, link = _bandwidth(same), known.published.link_gb_per_s
            yield f"{said}: latency", f"{same[0][1]:,.1f}", "us", NO_VALUE, NO_VALUE, NO_VALUE
            ratio = _ratio(rate, _bandwidth(others) if others else None)
            yield f"{said}: bytes of the message", f"{rate:,.2f}", "GB/s", _share(rate, link), NO_VALUE, ratio


def _bandwidth(rows: Sequence[Sequence[float]]) -> float:
    size, us = rows[-1]
    return size / us / 1e3


def _share(value: float, whole: float | None) -> str:
    return NO_VALUE if whole is None else f"{100 * value / whole:.1f}"


def _ratio(value: float, other: float | None) -> str:
    return NO_VALUE if other is None else f"{value / other:,.1f}"


def left_out(names: Sequence[str], took: float, budget_s: float) -> str:
    said = f"measured in {took:.0f} s of {budget_s:g}"
    if not names:
        return said
    more = f" and {len(names) - SHOWN_LEFT_OUT} more" if len(names) > SHOWN_LEFT_OUT else ""
    shown = f"{', '.join(names[:SHOWN_LEFT_OUT])}{more}"
    return f"{said}; left out, as their kind's share of the budget was used up: {shown}"
