"""Keys that only some runs read. A value that a user sets and no code reads would have no effect, so it is refused.

A table (`read_when.py`) says when each of these keys is read. `rules` makes rules from a table, and `unread` finds the
keys that a recorded run did not read, so that a comparison can leave them out. A key that has its default, or the value
of the run's preset, is never refused.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, get_type_hints

from omegaconf import MISSING

from train.config.fields import default_of
from train.config.plan import Plan
from train.config.rule import Finding, Rule
from train.config.rules.ranges import shortened
from train.config.schema import Composed, Config

Read = Callable[[str], Any]  # returns the plain value of a dotted key: for an enum, its name


@dataclass(frozen=True)
class Condition:
    """The condition under which a key is read: `holds` is a function of the values of `keys`.

    `says` completes the message "KEY=VALUE …" if the condition does not hold; each {} stands for the value of one of
    `keys`. `fixes`: lines of overrides with which the condition holds, best first.
    """

    keys: tuple[str, ...]
    holds: Callable[..., bool]
    says: str = ""
    fixes: Callable[[Config], tuple[str, ...]] = lambda config: ()

    def met(self, read: Read) -> bool:
        return self.holds(*map(read, self.keys))


Table = Mapping[str, Condition]


def rules(table: Table) -> tuple[Rule, ...]:
    """One rule for each key."""
    return tuple(
        Rule(f"unread_{key.replace('.', '_')}", f"only some runs read {key}", _check(key, table)) for key in table
    )


def unread(values: Mapping[str, Any], *tables: Table) -> set[str]:
    """The dotted keys in the values of a recorded config that its run did not read. A key counts as read if this cannot
    be decided."""
    return {key for table in tables for key, when in table.items() if key in values and not _was_met(when, values)}


def plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def written(value: Any) -> str:
    """A plain value in the grammar of overrides."""
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # without a dot YAML reads 1e5 as text
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else shortened(written(value))


def reader(config: Config) -> Read:
    """A function that returns the plain value of a dotted key, or None if this config has no such key."""

    def read(key: str) -> Any:
        value: Any = config
        for name in key.split("."):
            value = getattr(value, name, None)
        return plain(value)

    return read


def _check(key: str, table: Table) -> Callable[[Plan], Finding | None]:
    condition = table[key]

    def check(plan: Plan) -> Finding | None:
        config, read = plan.config, reader(plan.config)
        if not _refused(key, condition, config):
            return None
        shown, deciding = _shown(read(key)), (_shown(read(one)) for one in condition.keys)
        others = [_reset(other, config) for other, when in table.items() if _refused(other, when, config)]
        resets = dict.fromkeys((_reset(key, config), " ".join(others)))  # this key alone, or all keys that are not read
        fixes = tuple(line for line in resets if line and "" not in others)
        message = f"{key}={shown} {condition.says.format(*deciding)}"
        return Finding(message, (*condition.fixes(config), *fixes), f"leave {key} out")

    return check


def _refused(key: str, condition: Condition, config: Config) -> bool:
    read, standing = reader(config), _standing(key, config)
    return bool(standing) and read(key) not in standing and not condition.met(read)


def _standing(key: str, config: Config) -> list[Any]:
    """The plain values that the key may have without being set by the user: the preset's, then the field's default."""
    group, _, name = key.partition(".")
    found = [config.preset[key]] if isinstance(config, Composed) and key in config.preset else []
    kind: Any = type(getattr(config, group))
    default = _default(kind, name)
    return found if default == MISSING else [*found, default]


def _reset(key: str, config: Config) -> str:
    """The override that resets the key; empty if the value contains a space, which separates overrides in a line."""
    text = written(_standing(key, config)[0])
    return "" if " " in text else f"{key}={text}"


def _was_met(condition: Condition, values: Mapping[str, Any]) -> bool:
    def read(key: str) -> Any:
        if key in values:
            return values[key]
        group, _, name = key.partition(
            "."
        )  # a run of an older version, without this key, behaved as the default does now
        default = _default(_groups().get(group, Config), name)
        if default == MISSING:
            raise KeyError(key)
        return default

    try:
        return condition.met(read)
    except (KeyError, TypeError):  # a recorded config may come from anywhere, with values of any type
        return True


@cache
def _default(kind: Any, name: str) -> Any:
    """The plain default of a field; None if there is no such field."""
    field = {field.name: field for field in dataclasses.fields(kind)}.get(name)
    return None if field is None else plain(default_of(field))


@cache
def _groups() -> dict[str, Any]:
    return {name: kind for name, kind in get_type_hints(Config).items() if dataclasses.is_dataclass(kind)}
