"""The rows of netlab.json: a run at one speed, what was predicted for it, and how it ended."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.checking.records import predicted
from launch.emulating.placement import crossing_axes
from launch.emulating.predicting import Prediction
from launch.emulating.task import Point
from launch.sweeping.points import Entry
from train.record.run_files import number
from train.record.run_folder import DONE


def row_of(point: Point, speed: float | None, found: Prediction) -> dict[str, Any]:
    """The row of a run in netlab.json, before it has run."""
    degrees = {axis: degree for axis, degree in point.plan.degrees.items() if degree > 1}
    return {
        "label": point.label,
        "strategy": point.plan.config.strategy.name,
        "inter": speed,
        "order": [*point.order],
        "hosts": [*point.hosts],
        "crossing": crossing_axes(point.plan.degrees, point.hosts),
        "degrees": degrees,
        "predicted_at": time.time(),
        "predicted_ms": 1e3 * found.time.total,
        "predicted_parts_ms": predicted(found.time),
        "predicted_bubble_ms": 1e3 * found.time.bubble,
        "predicted_sent": found.sent,
        "predicted_messages": found.messages,
    }


def ahead(rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> str:
    """How long the steps of the runs take that are not done, by their predictions."""
    steps = {point.label: point.plan.config.train.steps for point in points}
    left = [row for row in rows if row.get("status") != DONE]
    seconds = sum(row["predicted_ms"] * steps[row["label"]] for row in left) / 1e3
    shown = f"{seconds:,.0f} s" if seconds < 100 else f"{seconds / 60:,.0f} minutes"
    return f"{len(left)} run(s) to go: {shown} by their predictions, without starts and evaluations"


def said(row: dict[str, Any], entry: Entry) -> str:
    """How a run ended, in a few words."""
    measured = number((entry.summary() or {}).get("perf/step_ms"))
    words = [] if measured is None else [f"{measured:,.1f} ms a step measured"]
    words += [f"{row['predicted_ms']:,.1f} ms predicted"] if "predicted_ms" in row else []
    return ", ".join([entry.status, *words])
