"""Files of runs and sweeps: they are written atomically, and read as untrusted input. Torch is not imported.

A folder of runs may come from somebody else, or from a machine that lost power. So a file is read only if it is a
regular file inside its folder, and only up to limits of size, depth and number of digits. Text is returned on one line,
without control characters of a terminal. A file that exceeds a limit raises `Unreadable`, whose text names the file and
the reason. run_folder.py defines the meaning of the values and their types.
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
MOST_CHARS, MOST_DIGITS = 4096, 20  # in one text; in one whole number
LARGEST = 1e100  # no figure of a run is larger, and larger ones would overflow when they are drawn
LAST_STEP, LAST_TIME = 10**12, 253402300799.0  # the second is the end of the year 9999
GIVEN = "given"  # the group in a run's `work` of what few runs are given, so that the others keep their hashes
TAG = re.compile(r"[\w./-]{1,200}", re.ASCII)


class Unreadable(ValueError):
    """A file is not as expected. The text is a sentence that begins with the name of the file."""


def write_whole(path: Path, text: str) -> None:
    """Write the file atomically: a reader finds the old text or the new one, never a part, even after a power loss."""
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
    """The text on one line. Characters that control a terminal or the direction of text are replaced, and long text is
    cut."""
    shown = str(text)
    cut = shown if len(shown) <= most else shown[: most - 1] + "…"
    return cut if cut.isprintable() else "".join(c if c.isprintable() else "\ufffd" for c in cut)


def number(value: Any) -> float | None:
    """The value if it is a finite number in the range of a run's figures, else None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
    return float(value) if good else None


def exists(path: Path) -> bool:
    """Whether the path exists, even as a broken link. False for a name that no file can have."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def entries(path: Path) -> list[Path]:
    """The entries of the folder. Empty if it is not a folder, or is a link."""
    try:
        return [] if path.is_symlink() else sorted(path.iterdir())
    except OSError:
        return []


def opened(path: Path) -> BinaryIO:
    """Open a regular file in its folder, or a link to one in the same folder. Never blocks, for example on a fifo."""
    real, folder = os.path.realpath(path), os.path.realpath(path.parent)
    if os.path.commonpath([real, folder]) != folder:
        raise Unreadable(f"{clean(path.name)} is a link that leads out of the folder")
    try:
        if not stat.S_ISREG(os.lstat(real).st_mode):
            raise Unreadable(f"{clean(path.name)} is not a regular file")
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Unreadable(f"{clean(path.name)} cannot be read ({error.strerror})") from error
    return open(handle, "rb")


def read_text(path: Path) -> str:
    """The whole file as UTF-8. Raises Unreadable if it is larger than the limit for its kind."""
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
        raise Unreadable(f"{clean(path.name)} is not UTF-8 text") from error


def read_json(path: Path) -> Record | None:
    """The object in the JSON file; None if there is no such file."""
    if not exists(path):
        return None
    return _object(path, parse(read_text(path), path.name))


def parse(text: str, name: str) -> Any:
    """The value of a JSON text. `NaN` and infinities, which older runs wrote, are accepted."""
    try:
        return json.loads(text, parse_int=_whole)
    except RecursionError as error:
        raise Unreadable(f"{clean(name)} is nested more than {DEEPEST} levels deep") from error
    except ValueError as error:
        raise Unreadable(f"{clean(name)} is not valid JSON ({clean(error, 80)})") from error


def read_yaml(path: Path) -> Record | None:
    """The mapping in the YAML file; None if there is no such file. Aliases and tags are refused: no run writes them."""
    if not exists(path):
        return None
    text, loader = read_text(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _check_events(text, path.name, loader)
        value = yaml.load(text, loader)
    except yaml.YAMLError as error:
        problem = clean(getattr(error, "problem", None) or error, 80)
        raise Unreadable(f"{path.name} is not valid YAML ({problem})") from error
    except (ValueError, OverflowError, RecursionError) as error:
        raise error if isinstance(error, Unreadable) else Unreadable(f"{path.name}: {clean(error, 80)}") from error
    return _object(path, value)


def read_records(path: Path) -> tuple[list[Record], list[str]]:
    """(Records, notes) of a metrics.jsonl. A record is a line with a valid step, and has the tags whose values are
    numbers; a number that a run cannot have becomes None. The notes say which lines were left out. An incomplete last
    line is left out without a note, because a run may be writing it."""
    records: list[Record] = []
    newest_of_ranks: list[str] = []
    with_ranks: Record = {}
    used = broken = 0
    notes: list[str] = []
    with opened(path) as file:
        while line := file.readline(MOST_LINE_BYTES):
            used += len(line)
            if used > MOST_RECORD_BYTES or len(records) == MOST_RECORDS:
                notes.append(f"{path.name}: only the first {len(records):,} lines are read, because it is very large")
                break
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                broken += line.endswith(b"\n") or len(line) == MOST_LINE_BYTES
                continue
            # values of single ranks are kept only for the newest step, so that long runs of many ranks fit in memory
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
        raise Unreadable(f"{clean(path.name)} does not contain an object")
    plain: Record = _plain(value, clean(path.name), DEEPEST)
    return plain


def _plain(value: Any, name: str, levels: int) -> Any:
    """The value with clean text. Raises Unreadable if its types are not those of JSON, or it is nested too deeply."""
    if isinstance(value, str):
        return clean(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        if value.bit_length() > math.log2(10) * MOST_DIGITS:
            raise Unreadable(f"{name} contains a number of more than {MOST_DIGITS} digits")
        return value
    if isinstance(value, datetime.date):  # YAML makes a date from text that looks like one
        return value.isoformat()
    if levels == 0:
        raise Unreadable(f"{name} is nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return [_plain(item, name, levels - 1) for item in value]
    if isinstance(value, dict):
        return {clean(key, 200): _plain(item, name, levels - 1) for key, item in value.items()}
    raise Unreadable(f"{name} contains a value of type {type(value).__name__}")


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_events(text: str, name: str, loader: Any) -> None:
    """Check the YAML before it is loaded: with aliases, a short file can become a tree that fills the memory."""
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
