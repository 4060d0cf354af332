"""The rows of netlab.json: a run at one speed, what was predicted for it, and how it ended."""

from __future__ import annotations

import time
from typing import Any

from launch.checking.records import predicted
from launch.emulating.placement import crossing_axes
from launch.emulating.predicting import Prediction
from launch.emulating.task import Point
from launch.sweeping.points import Entry
from train.record.run_files import number


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


def said(row: dict[str, Any], entry: Entry) -> str:
    """How a run ended, in a few words."""
    measured = number((entry.summary() or {}).get("perf/step_ms"))
    words = [] if measured is None else [f"{measured:,.1f} ms a step measured"]
    words += [f"{row['predicted_ms']:,.1f} ms predicted"] if "predicted_ms" in row else []
    return ", ".join([entry.status, *words])
