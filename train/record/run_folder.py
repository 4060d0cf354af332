"""What a run's folder says, and a sweep's, with its types checked. Torch is not imported.

Every key may be missing, as in folders of older versions; one that is there must be of its type, or the file that it
stands in raises `Unreadable`. Compare, sweep and the benchmarks read runs by this module and by nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config.rules.idle import unread
from train.config.rules.read_when import DECIDES_NUMBERS_WHEN, READ_WHEN
from train.measure.results import LOSS, VALIDATION_LOSS
from train.record.run_files import (
    Record,
    Unreadable,
    clean,
    exists,
    inside,
    is_count,
    number,
    read_json,
    read_records,
    read_yaml,
)
from train.record.tags import read_events

DEFAULT_WARMUP = 5  # steps, of a run that does not say it
MOST_RANKS, MOST_PIECES = 4096, 100_000  # of a sample
POINTS, PROBES = "points.json", "probes"  # of a sweep's folder; in the second are the short runs of `batch=best`
WAITING, RUNNING, DONE, FAILED, INVALID = "waiting", "running", "done", "failed", "invalid"  # a point's states
SAMPLE = re.compile(r"step-(\d{1,12})\.json")
Kind = tuple[str, Callable[[Any], bool]]  # what a value must be, in words and as a test


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return value is None or number(value) is not None or value != value  # null, and NaN of older runs


TEXT: Kind = ("a text", is_text)
NUMBER: Kind = ("a number", is_number)
COUNT: Kind = ("a whole number from 0 to 10^9", is_count)
OBJECT: Kind = ("an object", lambda value: isinstance(value, dict))
TEXTS: Kind = ("a list of texts", lambda value: isinstance(value, list) and all(map(is_text, value)))


def optional(kind: Kind) -> Kind:
    return f"{kind[0]} or null", lambda value: value is None or kind[1](value)


FACTS: dict[str, Kind] = {
    "work_hash": TEXT,
    "work": OBJECT,
    "strategy": TEXT,
    "degrees": ("an object of whole numbers", lambda v: isinstance(v, dict) and all(map(is_count, v.values()))),
    "world_size": COUNT,
    "sweep": optional(TEXT),
    "differs": OBJECT,
    "lossy": optional(OBJECT),
    "precision": TEXT,
    "warmup_steps": COUNT,
    "steps": COUNT,
    "tokens": ("a whole number", lambda value: is_count(value, 10**15)),
    "command": TEXT,
    **dict.fromkeys(("commit", "torch", "python", "device", "platform", "backend"), TEXT),
    "omp_threads": COUNT,
    **dict.fromkeys(("first_step_s", "total_s", LOSS, VALIDATION_LOSS, "perf/tokens_per_s"), NUMBER),
}
CONFIG: dict[str, Kind] = {
    "strategy": OBJECT,
    "model": OBJECT,
    "data": OBJECT,
    "train": OBJECT,
    "metrics": OBJECT,
}
CONFIG_KEYS: dict[str, Kind] = {
    "strategy.name": TEXT,
    "train.steps": COUNT,
    "metrics.warmup_steps": COUNT,
    "precision": TEXT,
}
POINT: dict[str, Kind] = {
    "label": TEXT,
    "overrides": TEXTS,
    "nproc": COUNT,
    "log": TEXT,
    "status": TEXT,
    "run_dir": optional(TEXT),
    "exit_code": optional(("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool))),
    "seconds": NUMBER,
    "problems": TEXTS,
    "tried": ("an object of numbers", lambda v: isinstance(v, dict) and all(map(is_number, v.values()))),
    "chosen": TEXTS,
}


@dataclass
class Folder:
    """A run's. `notes`: what was left out of it, a line each."""

    config: Record = field(default_factory=dict)  # flat: "train.seed" -> 1234
    work: Record = field(default_factory=dict)  # work.json
    summary: Record = field(default_factory=dict)  # empty until the run has ended
    records: list[Record] = field(default_factory=list)  # lines of metrics.jsonl
    sample: Record = field(default_factory=dict)  # the last samples/step-N.json that can be read
    notes: list[str] = field(default_factory=list)


def read_folder(path: Path) -> Folder:
    """All of a run's folder. Raises Unreadable if what decides the comparison cannot be read: all but a sample."""
    folder = Folder(read_config(path), read_facts(path / "work.json"), read_facts(path / "summary.json"))
    if exists(path / "metrics.jsonl"):
        folder.records, folder.notes = read_records(path / "metrics.jsonl")
    else:
        folder.records = read_events(path)
    samples = {int(match[1]): file for file in inside(path / "samples") if (match := SAMPLE.fullmatch(file.name))}
    for step in sorted(samples, reverse=True):
        try:
            folder.sample = read_sample(samples[step])
            break
        except Unreadable as error:
            folder.notes.append(f"samples/{error}; it is left out")
    return folder


def warmup_steps(summary: Record, config: Record) -> int:
    """How many of the run's first steps its medians leave out, from summary.json or the flat config."""
    own: int = config.get("metrics.warmup_steps", DEFAULT_WARMUP)
    steps: int = summary.get("warmup_steps", own)
    return steps


def read_facts(path: Path) -> Record:
    """Of work.json or summary.json; empty if there is no such file."""
    facts = read_json(path) or {}
    check(facts, FACTS, path.name)
    return facts


def read_config(path: Path) -> Record:
    """config.yaml, flat: `train.seed` -> 1234."""
    tree = read_yaml(path / "config.yaml") or {}
    check(tree, CONFIG, "config.yaml")
    config = flat(tree)
    for key in CONFIG_KEYS:
        if "${" in str(config.get(key)):  # as it was typed: what it came to says summary.json
            del config[key]
    check(config, CONFIG_KEYS, "config.yaml")
    return config


def read_points(path: Path) -> tuple[Record, list[str]]:
    """A sweep's points.json, with the points that are whole, and a line for each other; empty if there is no such file.
    A point need not have every key."""
    values = read_json(path) or {}
    check(values, {"points": ("a list", lambda v: isinstance(v, list)), "fairness": TEXT, "line": TEXT}, path.name)
    whole, notes = [], []
    for place, point in enumerate(values.get("points", []), start=1):
        try:
            if not isinstance(point, dict):
                raise Unreadable("no object")
            check(point, POINT, "it")
            whole.append(point)
        except Unreadable as error:
            notes.append(f"{path.name}: point {place} is left out ({error})")
    return values | {"points": whole}, notes


def read_sample(path: Path) -> Record:
    """`ranks`, each with its number, its memory at the peak and its timeline, as far as they are of their types."""
    sample = read_json(path) or {}
    ranks = sample.get("ranks")
    if not isinstance(ranks, list) or not 0 < len(ranks) <= MOST_RANKS:
        raise Unreadable(f"{path.name}: ranks is not a list of 1 to {MOST_RANKS:,} ranks")
    numbers = [rank.get("rank") if isinstance(rank, dict) else None for rank in ranks]
    if not all(map(is_count, numbers)) or len(set(numbers)) < len(numbers):
        raise Unreadable(f"{path.name}: ranks are not each an object with a number of its own")
    pieces = [piece for rank in ranks for piece in _list(rank.get("timeline"))]
    if len(pieces) > MOST_PIECES or not all(map(_is_piece, pieces)):
        raise Unreadable(
            f"{path.name}: a timeline is not at most {MOST_PIECES:,} of [kind, stage, microbatch, from, to]"
        )
    whole = []
    for rank in ranks:
        memory = rank.get("memory")
        at_peak = memory.get("at_peak_mib") if isinstance(memory, dict) else None
        kinds = (
            {kind: mib for kind, mib in at_peak.items() if number(mib) is not None} if isinstance(at_peak, dict) else {}
        )
        whole.append({"rank": rank["rank"], "memory": {"at_peak_mib": kinds}, "timeline": _list(rank.get("timeline"))})
    return {"ranks": whole}


def check(values: Record, kinds: dict[str, Kind], name: str) -> None:
    """Raise Unreadable for the first key that is there and not of its type."""
    for key, (words, good) in kinds.items():
        if key in values and not good(values[key]):
            raise Unreadable(f"{name}: {key} is {clean(values[key], 40)}, not {words}")


def hash_of(work: Record) -> str:
    """8 hex digits of what decides a run's numbers: runs that have them in common are comparable."""
    return hashlib.sha256(json.dumps(deciding(work), sort_keys=True).encode()).hexdigest()[:8]


def deciding(work: Record) -> Record:
    """The work without the keys that its run did not read, or that decide no number."""
    idle = unread(flat(work), READ_WHEN, DECIDES_NUMBERS_WHEN)
    return {
        group: {name: value for name, value in keys.items() if f"{group}.{name}" not in idle}
        if isinstance(keys, dict)
        else keys
        for group, keys in work.items()
    }


def flat(tree: Any, path: str = "") -> Record:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: leaf for key, value in tree.items() for name, leaf in flat(value, f"{path}.{key}".lstrip(".")).items()
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_piece(piece: Any) -> bool:
    if not isinstance(piece, list) or len(piece) != 5 or not is_text(piece[0]) or not all(map(is_count, piece[1:3])):
        return False
    start, stop = number(piece[3]), number(piece[4])
    return start is not None and stop is not None and 0 <= start <= stop
