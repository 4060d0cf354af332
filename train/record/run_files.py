"""Files of runs and sweeps: written in one piece, and read without trust. Torch is not imported.

A folder of runs may come from somebody else, or from a machine that lost its power. So a file is read only if it is a
regular one inside its folder, up to a size and a depth; numbers have a largest number of digits; text comes back on one
line, without characters that steer a terminal. What breaks a limit raises `Unreadable`, whose text names the file and
says why. What the values mean, and their types: run_folder.py.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import re
import stat
import sys
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from train.measure.results import BY_RANK, MiB

Record = dict[str, Any]
MOST_BYTES = {".json": 16 * MiB, ".yaml": MiB // 4, ".log": 64 * MiB}
MOST_RECORD_BYTES, MOST_RECORDS, MOST_LINE_BYTES = 128 * MiB, 500_000, MiB
DEEPEST, MOST_EVENTS = 16, 20_000  # levels of nesting; nodes of a YAML file
MOST_CHARS, MOST_DIGITS = 4096, 20  # of one text, of one whole number
LARGEST = 1e100  # beyond it no figure of a run is meant, and pictures' arithmetic overflows
LAST_STEP, LAST_TIME = 10**12, 253402300799.0  # the second is the end of the year 9999
TAG = re.compile(r"[\w./-]{1,200}", re.ASCII)


class Unreadable(ValueError):
    """A file that is not what it should be. The text is a sentence that begins with the file's name."""


def write_whole(path: Path, text: str) -> None:
    """Write the file so that a reader finds the old text or the new one, never a part, also after a loss of power."""
    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink()
        raise


def clean(text: object, most: int = MOST_CHARS) -> str:
    """The text on one line: what a terminal would obey or a page would turn round is replaced, what is long is cut."""
    shown = str(text)
    cut = shown if len(shown) <= most else shown[: most - 1] + "…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in cut)


def number(value: Any) -> float | None:
    """The value if it is a finite number that a run can have, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return float(value) if good else None


def exists(path: Path) -> bool:
    """Whether anything has this name, a broken link too; False for a name that no file can have."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def inside(path: Path) -> list[Path]:
    """What lies in the folder; nothing if it is none, or a link."""
    try:
        return [] if path.is_symlink() else sorted(path.iterdir())
    except OSError:
        return []


def opened(path: Path) -> BinaryIO:
    """A regular file that lies in its folder, or is a link to one that does. Never waits, as for a fifo's writer."""
    real, folder = os.path.realpath(path), os.path.realpath(path.parent)
    if os.path.commonpath([real, folder]) != folder:
        raise Unreadable(f"{clean(path.name)} is a link out of the folder")
    try:
        if not stat.S_ISREG(os.lstat(real).st_mode):
            raise Unreadable(f"{clean(path.name)} is no regular file")
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{clean(path.name)} cannot be read ({error.strerror})") from error
    return open(handle, "rb")


def read_text(path: Path) -> str:
    """The whole file as UTF-8, if it is no larger than its kind may be."""
    most = MOST_BYTES.get(path.suffix, MOST_CHARS)
    with opened(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Unreadable(f"{clean(path.name)} is larger than {most:,} bytes")
    if not content.strip():
        raise Unreadable(f"{clean(path.name)} is empty")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{clean(path.name)} is no UTF-8 text") from error


def read_json(path: Path) -> Record | None:
    """The object in the file; None if there is no such file."""
    if not exists(path):
        return None
    return _object(path, parse(read_text(path), path.name))


def parse(text: str, name: str) -> Any:
    """JSON's value; `NaN` and infinities, which older runs wrote, are taken."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise Unreadable(f"{clean(name)} is nested more than {DEEPEST} levels deep") from error
    except ValueError as error:
        raise Unreadable(f"{clean(name)} is not whole JSON ({clean(error, 80)})") from error


def read_yaml(path: Path) -> Record | None:
    """The mapping in the file; None if there is no such file. Aliases and tags, which no run writes, are refused."""
    if not exists(path):
        return None
    text, loader = read_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(text, path.name, loader)
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise Unreadable(f"{path.name} is no YAML ({clean(getattr(error, 'problem', None) or error, 80)})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"{path.name}: {clean(error, 80)}") from error
    return _object(path, value)


def read_records(path: Path) -> tuple[list[Record], list[str]]:
    """The lines of a metrics.jsonl whose step is a count, with the tags that are numbers, or None where the number is
    none that a run can have; and notes on the others. A last line that is being written is skipped without
    a word."""
    records: list[Record] = []
    newest_of_ranks: list[str] = []
    with_ranks: Record = {}
    used = broken = 0
    notes: list[str] = []
    with opened(path) as file:
        while line := file.readline(MOST_LINE_BYTES):
            used += len(line)
            if used > MOST_RECORD_BYTES or len(records) == MOST_RECORDS:
                notes.append(f"{path.name}: only the first {len(records):,} lines are read, as it is very large")
                break
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                broken += line.endswith(b"\n") or len(line) == MOST_LINE_BYTES
                continue
            # only the newest figures of single ranks are shown, and long runs of many ranks must fit into memory
            if of_ranks := [tag for tag in record if tag.startswith(BY_RANK)]:
                for tag in newest_of_ranks:
                    del with_ranks[tag]
                newest_of_ranks, with_ranks = of_ranks, record
            records.append(record)
    if broken:
        notes.append(f"{path.name}: {broken:,} line(s) cannot be read and are left out")
    return records, notes


def _record(line: bytes) -> Record | None:
    try:
        values = parse(line.decode(), "line")
    except ValueError:
        return None
    if not isinstance(values, dict) or not is_count(values.get("step"), LAST_STEP):
        return None
    time = values.get("time")
    if time is not None and not (isinstance(time, int | float) and 0 <= time <= LAST_TIME):
        del values["time"]
    return {
        sys.intern(tag): value if tag == "step" else number(value)
        for tag, value in values.items()
        if TAG.fullmatch(tag) and (value is None or (isinstance(value, int | float) and not isinstance(value, bool)))
    }


def is_count(value: Any, most: float = 10**9) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _object(path: Path, value: Any) -> Record:
    if not isinstance(value, dict):
        raise Unreadable(f"{clean(path.name)} holds no object")
    plain: Record = _plain(value, clean(path.name), DEEPEST)
    return plain


def _plain(value: Any, name: str, levels: int) -> Any:
    """The value with clean text, if it is of JSON's types and not nested too deeply."""
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > math.log2(10) * MOST_DIGITS:
            raise Unreadable(f"{name} holds a number of more than {MOST_DIGITS} digits")
        return value
    if isinstance(value, datetime.date):  # YAML's, of text that looks like one
        return value.isoformat()
    if levels == 0:
        raise Unreadable(f"{name} is nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return [_plain(item, name, levels - 1) for item in value]
    if isinstance(value, dict):
        return {clean(key, 200): _plain(item, name, levels - 1) for key, item in value.items()}
    raise Unreadable(f"{name} holds a {type(value).__name__}")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_events(text: str, name: str, loader: Any) -> None:
    """Before anything is built: a short file may stand for a tree that fills the memory."""
    levels = 0
    for count, event in enumerate(yaml.parse(text, loader)):
        levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise Unreadable(f"{name} has anchors or aliases, which no run writes")
        if getattr(event, "tag", None):
            raise Unreadable(f"{name} has tags, which no run writes")
        if levels > DEEPEST:
            raise Unreadable(f"{name} is nested more than {DEEPEST} levels deep")
        if count > MOST_EVENTS or len(getattr(event, "value", None) or "") > MOST_CHARS:
            raise Unreadable(f"{name} is longer than a config can be")
