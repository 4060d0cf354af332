"""Translate the words of a command line, as they are typed, into Hydra's grammar.

Hydra's grammar does not allow `=`, `(`, `~`, `#` or letters beyond ASCII in a value, and reads 007 and 1e3 as numbers.
Here the value of a text key is used as it was typed. Only quotes, commas (several values), `null` and `${…}` keep their
meaning in Hydra. A path may begin with `~`, which means the user's home folder.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import cache
from typing import get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from train.command.schemas import SCHEMAS
from train.config.problems import BadInput, Problem

PATHS = ("data.path", "metrics.dir")
GRAMMAR = re.compile(r"^\w+\s*\(|['\"\[{]")  # in choice(a,b), 'a,b' and [a,b] the comma is inside one value or function
HOW_TO_QUOTE = "a value with commas or brackets needs two pairs of quotes: \"key='a,b'\""


def quoted(word: str) -> str:
    """The word in Hydra's grammar. Raises BadInput if it has characters that cannot be written to a file or shown on a
    terminal, and if it configures Hydra itself, which has no effect here."""
    _check_characters(word)
    _check_hydra(word)
    key, equals, value = word.partition("=")
    if not equals or key.lstrip("+") not in text_keys():
        return word
    if "," not in value:
        return f"{key}={_as_text(key, value)}"
    if _parses(word) or GRAMMAR.search(value):
        return word
    return f"{key}={','.join(_as_text(key, part) for part in value.split(','))}"


@cache
def text_keys() -> frozenset[str]:
    """Dotted keys whose values are text."""
    return frozenset(key for (group, _), schema in SCHEMAS.items() for key, kind in keys(schema, group or "")
                     if kind is str or set(get_args(kind)) == {str, type(None)})  # fmt: skip


def keys(schema: type, path: str) -> Iterator[tuple[str, object]]:
    """The dotted keys of a dataclass and of the dataclasses in it, with their types."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key = f"{path}.{field.name}".lstrip(".")
        kind = types[field.name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from keys(kind, key)
        else:
            yield key, kind


def _as_text(key: str, value: str) -> str:
    in_quotes = len(value) > 1 and value[0] in "'\"" and value[-1] == value[0]
    if in_quotes or value in ("", "null"):
        return value
    if key.lstrip("+") in PATHS and value.startswith("~"):
        value = os.path.expanduser(value)
    return with_quotes(value)


def with_quotes(value: str) -> str:
    """A text in quotes, so that Hydra reads it as text."""
    return QuotedString(value, Quote.single).with_quotes()


def _parses(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _check_characters(word: str) -> None:
    shown = word.encode("utf-8", "backslashreplace").decode()
    if shown != word:
        raise BadInput(Problem("characters", f"{shown} has bytes that are not UTF-8", "rename the file or folder"))
    if not word.isprintable():
        shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in word)
        raise BadInput(Problem("characters", f"{shown} has a character that cannot be shown", "leave it out"))


def _check_hydra(word: str) -> None:
    found = re.match(r"[+~]*hydra(?:[./@:](\w*)|=|$)", word)
    if found is None:
        return
    fix = "leave it out"
    if found[1] in ("run", "job", "output_subdir"):
        fix += "; metrics.dir=FOLDER says where runs are written"
    if found[1] in ("sweep", "launcher", "sweeper", "mode"):
        fix += "; python -m launch.sweep starts several runs"
    raise BadInput(Problem("hydra", f"{word} has no effect: Hydra only composes the config here", fix))
