"""Predictions of a step beside what was measured, part by part, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from launch.checking.records import Measured


def table(run: Measured, found: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    """`found`: the parts of each prediction in milliseconds, by its name."""
    names = list(dict.fromkeys([*run.parts, *(part for parts in found.values() for part in parts)]))
    names = [name for name in names if name not in ("optimiser", "other")] + ["optimiser", "other"]
    columns = [run.parts, *found.values()]
    widths = [max(12, len(name) + 2) for name in ("measured", *found)]
    yield f"  {'ms':<20}" + "".join(f"{name:>{w}}" for name, w in zip(("measured", *found), widths, strict=True))
    for name in names:
        cells = (f"{parts[name]:.1f}" if name in parts else "-" for parts in columns)
        yield f"  {name:<20}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
    totals = [run.step_ms, *(sum(parts.values()) for parts in found.values())]
    yield f"  {'step':<20}" + "".join(f"{total:>{w}.1f}" for total, w in zip(totals, widths, strict=True))
