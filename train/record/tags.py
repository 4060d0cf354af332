"""The names of the tags of metrics.jsonl in TensorBoard, and how its event files are read.

TensorBoard sorts groups of tags by name. Results and training keep their names. The tags that explain them are under
`why`, and so come after them; values of single ranks have a group of their own. Torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

from train.measure.results import BY_RANK, VALIDATION_LOSS, MiB
from train.record.run_files import (
    LAST_STEP,
    LAST_TIME,
    TAG,
    Record,
    Unreadable,
    clean,
    entries,
    is_count,
    number,
    opened,
)

EVENTS, MOST_EVENT_BYTES = "tfevents", 128 * MiB

FIRST_GROUPS = ("result", "train", "validation", "perf", "memory")
WHY, WHY_BY_RANK, WHY_PICTURES = "why/", "why_by_rank/", "why_pictures/"


def shown_as(tag: str) -> str:
    """The tag in TensorBoard for a tag of metrics.jsonl."""
    if tag.startswith(BY_RANK):
        return WHY_BY_RANK + tag.removeprefix(BY_RANK)
    return tag if tag.split("/")[0] in FIRST_GROUPS else WHY + tag


def logged_as(tag: str) -> str:
    """The tag in metrics.jsonl for a tag of TensorBoard."""
    if tag.startswith(WHY_BY_RANK):
        return BY_RANK + tag.removeprefix(WHY_BY_RANK)
    return tag.removeprefix(WHY)


def read_events(path: Path) -> list[Record]:
    """The records from TensorBoard's event files, whose values are float32. Empty if there is no such file."""
    files = [file for file in entries(path) if EVENTS in file.name]
    if not files:
        return []
    total = 0
    for file in files:
        with opened(file) as content:
            total += content.seek(0, 2)
    if total > MOST_EVENT_BYTES:
        raise Unreadable(f"the event files are larger than {MOST_EVENT_BYTES:,} bytes")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps: dict[tuple[int, bool], Record] = {}
    try:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        for tag in filter(TAG.fullmatch, events.Tags()["scalars"]):
            for event in events.Scalars(tag):
                if not 0 <= event.wall_time <= LAST_TIME:
                    raise Unreadable(f"the event files have the invalid time {clean(event.wall_time, 40)}")
                key = (int(event.step), tag == VALIDATION_LOSS)
                record = steps.setdefault(key, {"step": int(event.step), "time": event.wall_time})
                record[logged_as(tag)] = number(event.value)
    except Exception as error:  # another package reads bytes that may be anything, so any exception is possible
        raise Unreadable(f"the event files cannot be read ({clean(error, 80)})") from error
    return [steps[key] for key in sorted(steps) if is_count(key[0], LAST_STEP)]
