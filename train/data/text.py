"""Texts as bytes: texts that come with CPython, a file, the files of a folder, and a field of JSON Lines."""

from __future__ import annotations

import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train.config.problems import BadInput, Problem
from train.config.schema import Config
from train.data.folder import JSON_LINES, Folder, find, head_of
from train.data.formats import MEGATRON, NPY, foreign, is_binary
from train.data.tokens import InFile, InMemory, JoinedFiles, Tokens, shown

MOST_JSON_LINES = 2**28  # bytes of the files; every rank keeps their text in memory


@dataclass(frozen=True)
class Source:
    """Tokens. `says`: a line that describes them."""

    tokens: Tokens
    says: str
    is_bytes: bool = True


def python_docs() -> Source:
    from pydoc_data.topics import topics

    text = _joined(topics[name].encode() for name in sorted(topics))
    return Source(text, f"{len(text):,} bytes of CPython's help topics")


def python_source() -> Source:
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests", "idlelib", "lib2to3"}
    modules = (path for path in sorted(root.rglob("*.py")) if not skipped & set(path.relative_to(root).parts))
    text = _joined(path.read_bytes() for path in modules)
    return Source(text, f"{len(text):,} bytes of the source of CPython's standard library")


def text(path: Path, config: Config) -> Source:
    """A file, or the files of a folder, read when they are needed. Raises BadInput if a file is not text."""
    if path.is_dir():
        found = find(path, config.data.glob, json_lines=False, runs=Path(config.metrics.dir))
        return Source(JoinedFiles.of(found.files), f"{shown(path)}: {found.says()}")
    _check_glob(config)
    head, name = head_of(path), f"data.path={shown(path)}"
    if path.suffix.lower() in JSON_LINES:
        fix = "use data=jsonl, and data.field for the field that holds the text"
        raise BadInput(Problem("text_file", f"{name} is a file of JSON Lines, not of text", fix))
    _refuse_others(name, head)
    size = path.stat().st_size
    looks = ", which look binary" if is_binary(head) else ""
    return Source(InFile(path, np.dtype(np.uint8), 0, 0, size), f"{shown(path)}: {size:,} bytes{looks}")


def json_lines(path: Path, config: Config) -> Source:
    """One field of every line, as UTF-8, with a line feed between two. Raises BadInput if a line does not have it."""
    if path.is_dir():
        found = find(path, config.data.glob, json_lines=True, runs=Path(config.metrics.dir))
    else:
        _check_glob(config)
        _refuse_others(f"data.path={shown(path)}", head_of(path))
        found = Folder([(path, path.stat().st_size)])
    size = sum(size for _, size in found.files)
    if size > MOST_JSON_LINES:
        message = f"data.path={shown(path)} has {size:,} bytes of JSON Lines, but at most {MOST_JSON_LINES:,} are read"
        fix = "write their text to a file for data=text, or their token ids to one for data=tokens"
        raise BadInput(Problem("json_lines_size", message, fix))
    field = str(config.data.field)
    whole, documents = bytearray(), 0
    for file, _ in found.files:
        for document in _documents(file, field):
            whole += b"\n" * bool(documents) + document
            documents += 1
    says = f"{shown(path)}: {found.says()}; {documents:,} documents, {len(whole):,} bytes in their field {field!r}"
    return Source(InMemory(np.frombuffer(bytes(whole), np.uint8)), says)


def _documents(path: Path, field: str) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {shown(path)}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                fix = "use a file with one JSON object on each line, or data=text to read it as it is"
                raise BadInput(Problem("json_lines", f"{where} is not JSON ({_first(error)})", fix)) from error
            if not isinstance(value, dict):
                fix = "use a file with one JSON object on each line"
                raise BadInput(Problem("json_lines", f"{where} is not a JSON object", fix))
            if not isinstance(found := value.get(field), str):
                texts = [key for key in value if isinstance(value[key], str) and re.fullmatch(r"[\w.-]{1,60}", key)]
                fix = f"use data.field={texts[0]}" if texts else "use lines that have a field with text"
                why = "is not a string" if field in value else "is missing"
                keys = shown(", ".join(list(value)[:8]))[:200]
                message = f"data.field={field} {why} in {where}, whose fields are: {keys}"
                raise BadInput(Problem("json_lines", message, fix, (f"data.field={texts[0]}",) if texts else ()))
            yield found.encode("utf-8", "surrogatepass")


def _refuse_others(name: str, head: bytes) -> None:
    if head.startswith((NPY, MEGATRON)):
        raise BadInput(Problem("text_file", f"{name} is a file of token ids, not of text", "use data=tokens"))
    if (kind := foreign(head)) is not None:
        raise BadInput(Problem("text_file", f"{name} is {kind[0]}, not text", kind[1]))


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def _check_glob(config: Config) -> None:
    if config.data.glob is not None:
        message = f"data.glob={config.data.glob} chooses files of a folder, but data.path={config.data.path} is a file"
        raise BadInput(Problem("data_glob", message, "use data.glob=null, or a folder", ("data.glob=null",)))


def _joined(parts: Iterable[bytes]) -> InMemory:
    return InMemory(np.frombuffer(b"\n".join(parts), dtype=np.uint8))
