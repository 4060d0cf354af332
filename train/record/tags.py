"""What the tags of metrics.jsonl are called in TensorBoard, which lists groups by name: results and training as they
are, what explains them behind them under `why`, and the figures of single ranks apart. Torch is not imported."""

from __future__ import annotations

FIRST_GROUPS = ("result", "train", "validation", "perf", "memory")
BY_RANK = ("memory_by_rank/", "why_by_rank/")
WHY = "why/"


def shown_as(tag: str) -> str:
    """The tag in TensorBoard of one in metrics.jsonl."""
    logged, shown = BY_RANK
    if tag.startswith(logged):
        return shown + tag.removeprefix(logged)
    return tag if tag.split("/")[0] in FIRST_GROUPS else WHY + tag


def logged_as(tag: str) -> str:
    """The tag in metrics.jsonl of one in TensorBoard."""
    logged, shown = BY_RANK
    return logged + tag.removeprefix(shown) if tag.startswith(shown) else tag.removeprefix(WHY)
