"""Reads the folder of a run or a sweep, and checks the types of its values. Torch is not imported.

Any key may be missing, as in folders of older versions. If a key has a value of another type, its file raises
`Unreadable`. Compare, sweep and the benchmarks read runs only with this module.
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
    entries,
    exists,
    is_count,
    number,
    read_json,
    read_records,
    read_yaml,
)
from train.record.tags import read_events

DEFAULT_WARMUP = 5  # steps, for a run whose files do not name the number
MOST_RANKS, MOST_PIECES = 4096, 100_000  # in a sample
POINTS, PROBES = "points.json", "probes"  # in a sweep's folder; `probes` has the short runs of `batch=best`
WAITING, RUNNING, DONE, FAILED, INVALID = "waiting", "running", "done", "failed", "invalid"  # states of a point
SAMPLE = re.compile(r"step-(\d{1,12})\.json")
Kind = tuple[str, Callable[[Any], bool]]  # what a value must be: in words, and as a test


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return value is None or number(value) is not None or value != value  # a number, null, or NaN from older runs


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
    """The content of a run's folder. `notes`: one line for each thing that was left out."""

    config: Record = field(default_factory=dict)  # flat: "train.seed" -> 1234
    work: Record = field(default_factory=dict)  # work.json
    summary: Record = field(default_factory=dict)  # empty until the run has ended
    records: list[Record] = field(default_factory=list)  # lines of metrics.jsonl
    sample: Record = field(default_factory=dict)  # the last samples/step-N.json that can be read
    notes: list[str] = field(default_factory=list)


def read_folder(path: Path) -> Folder:
    """Read the folder of a run. Raises Unreadable if a file cannot be read, except a sample, which gives a note."""
    folder = Folder(read_config(path), read_facts(path / "work.json"), read_facts(path / "summary.json"))
    if exists(path / "metrics.jsonl"):
        folder.records, folder.notes = read_records(path / "metrics.jsonl")
    else:
        folder.records = read_events(path)
    samples = {int(match[1]): file for file in entries(path / "samples") if (match := SAMPLE.fullmatch(file.name))}
    for step in sorted(samples, reverse=True):
        try:
            folder.sample = read_sample(samples[step])
            break
        except Unreadable as error:
            folder.notes.append(f"samples/{error}; it is left out")
    return folder


def warmup_steps(summary: Record, config: Record) -> int:
    """The number of first steps that the medians of the run leave out, from summary.json or the flat config."""
    own: int = config.get("metrics.warmup_steps", DEFAULT_WARMUP)
    steps: int = summary.get("warmup_steps", own)
    return steps


def read_facts(path: Path) -> Record:
    """The facts in work.json or summary.json; empty if there is no such file."""
    facts = read_json(path) or {}
    check(facts, FACTS, path.name)
    return facts


def read_config(path: Path) -> Record:
    """The config in config.yaml, flat: `train.seed` -> 1234."""
    tree = read_yaml(path / "config.yaml") or {}
    check(tree, CONFIG, "config.yaml")
    config = flat(tree)
    for key in CONFIG_KEYS:
        if "${" in str(config.get(key)):  # an interpolation, whose result is in summary.json
            del config[key]
    check(config, CONFIG_KEYS, "config.yaml")
    return config


def read_points(path: Path) -> tuple[Record, list[str]]:
    """The content of a sweep's points.json with its valid points, and a note for each point that is not valid. Empty if
    there is no such file. A point may lack keys."""
    values = read_json(path) or {}
    check(values, {"points": ("a list", lambda v: isinstance(v, list)), "fairness": TEXT, "line": TEXT}, path.name)
    whole, notes = [], []
    for place, point in enumerate(values.get("points", []), start=1):
        try:
            if not isinstance(point, dict):
                raise Unreadable("it is not an object")
            check(point, POINT, "it")
            whole.append(point)
        except Unreadable as error:
            notes.append(f"{path.name}: point {place} is left out ({error})")
    return values | {"points": whole}, notes


def read_sample(path: Path) -> Record:
    """The `ranks` of a sample: the number, the memory at the peak and the timeline of each. Values of other types are
    left out."""
    sample = read_json(path) or {}
    ranks = sample.get("ranks")
    if not isinstance(ranks, list) or not 0 < len(ranks) <= MOST_RANKS:
        raise Unreadable(f"{path.name}: ranks is not a list of 1 to {MOST_RANKS:,} ranks")
    numbers = [rank.get("rank") if isinstance(rank, dict) else None for rank in ranks]
    if not all(map(is_count, numbers)) or len(set(numbers)) < len(numbers):
        raise Unreadable(f"{path.name}: ranks are not all objects with different numbers")
    pieces = [piece for rank in ranks for piece in _list(rank.get("timeline"))]
    if len(pieces) > MOST_PIECES or not all(map(_is_piece, pieces)):
        raise Unreadable(
            f"{path.name}: a timeline is not a list of [kind, stage, microbatch, from, to], or all together are longer "
            f"than {MOST_PIECES:,}"
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
    """Raise Unreadable for the first key whose value has another type."""
    for key, (words, good) in kinds.items():
        if key in values and not good(values[key]):
            raise Unreadable(f"{name}: {key} is {clean(values[key], 40)}, not {words}")


def hash_of(work: Record) -> str:
    """8 hex digits of the hash of what decides a run's numbers. Runs with the same hash can be compared."""
    return hashlib.sha256(json.dumps(deciding(work), sort_keys=True).encode()).hexdigest()[:8]


def deciding(work: Record) -> Record:
    """The work without the keys that are `idle`."""
    left_out = idle(work)

    def read(group: str, keys: Record) -> Record:
        return {name: x for name, x in keys.items() if f"{group}.{name}" not in left_out}

    return {group: read(group, keys) if isinstance(keys, dict) else keys for group, keys in work.items()}


def idle(work: Record) -> set[str]:
    """The dotted keys that the run did not read, or that do not affect the numbers."""
    return unread(flat(work), READ_WHEN, DECIDES_NUMBERS_WHEN)


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
