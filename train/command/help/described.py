"""Descriptions of keys and presets for `--help` and docs/configuration.md. Torch is not imported."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from enum import Enum
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from train.command.resources import CONFIG_DIR
from train.config.fields import default_of

SINGULAR = {bool: "true or false", int: "integer", float: "number", str: "text"}
PLURAL = {int: "integers", float: "numbers", str: "texts", Any: "tables of numbers"}


@dataclass(frozen=True)
class Key:
    """A key in words. `name` and `default` are in the grammar of overrides; `default` is empty if each preset has its
    own value."""

    name: str
    values: str
    default: str
    help: str


def keys(schema: type, group: str) -> list[Key]:
    """The keys of a dataclass, without those of nested dataclasses. `group`: the part of their names before the dot."""
    hints = get_type_hints(schema)
    found = []
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if not dataclasses.is_dataclass(kind):
            name = f"{group}.{field.name}".lstrip(".")
            found.append(Key(name, _values(kind, field.metadata), _default(field), field.metadata.get("help", "")))
    return found


def written(value: Any) -> str:
    """A value in the grammar of overrides."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(one)}' for key, one in value.items())}}}"
    return "null" if value is None else str(value) or "''"


def preset_help(group: str, preset: str) -> str:
    """The text of the comment at the top of the preset's file."""
    lines = []
    for line in (CONFIG_DIR / group / f"{preset}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def _values(kind: Any, metadata: Any) -> str:
    """The type of a key, and its range or choices."""
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        (kind,) = (one for one in get_args(kind) if one is not type(None))
    if choices := metadata.get("choices") or _names(kind):
        text = f"one of {', '.join(choices)}"
    elif get_origin(kind) is list:
        (part,) = get_args(kind)
        text = f"list of {', '.join(_names(part)) or PLURAL[part]}"
    elif get_origin(kind) is dict:
        text = f"mapping of names to {PLURAL[get_args(kind)[1]]}"
    else:
        text = SINGULAR[kind] + _range(kind, metadata.get("bounds"))
    return f"{text} or null" if optional else text


def _names(kind: Any) -> list[str]:
    """The names of an enum's values, which a command line uses; empty for other types."""
    return [one.name for one in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []


def _range(kind: type, bounds: dict[str, float | None] | None) -> str:
    if bounds is None:
        return ""
    ge, gt, le, lt = (bounds[name] for name in ("ge", "gt", "le", "lt"))
    if kind is int:
        least = gt + 1 if gt is not None else ge
        most = lt - 1 if lt is not None else le
        if least is not None and most is not None:
            return f" from {least:,} to {most:,}"
        return f" >= {least:,}" if least is not None else f" <= {most:,}" if most is not None else ""
    signs = {">=": ge, ">": gt, "<=": le, "<": lt}
    limits = [f"{sign} {_plain(bound)}" for sign, bound in signs.items() if bound is not None]
    return f" {' and '.join(limits)}" if limits else ""


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) and 1 <= value <= 1e9 else f"{value:g}"


def _default(field: dataclasses.Field[Any]) -> str:
    default = default_of(field)
    return "" if default == MISSING else written(default)
