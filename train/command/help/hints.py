"""Suggestions for a word of a command line that is neither a key of the config nor an option of the tool."""

from __future__ import annotations

import difflib
from typing import Any

from train.command import options
from train.command.idle import listed
from train.command.option import Option
from train.command.overrides import keys
from train.command.schemas import SCHEMAS
from train.config.problems import Problem

CUTOFF = 0.7  # difflib's ratio from which on a word may be a misspelling of another
NO_DASHES = "see --help; keys and options are written without dashes, as train.steps=20 or nproc=4"


def unknown_key(key: str, tool: str) -> Problem:
    """The problem of an unknown key. It suggests keys or options of the tool whose last word is similar, those of the
    same group first."""
    group, _, word = key.rpartition(".")
    known: dict[str, set[str]] = {}  # full names by their last words
    for (place, _), schema in SCHEMAS.items():
        for name, _ in keys(schema, place or ""):
            known.setdefault(name.rpartition(".")[2], set()).add(name)
    option = options.named(key)
    if option and (tool in option.tools or key not in known):
        return _misplaced(option, tool)
    if not group:
        for one in options.OPTIONS:
            known.setdefault(one.name, set()).add(_where(one, tool))
    nearest = difflib.get_close_matches(word.lower(), known, n=1, cutoff=CUTOFF)
    found = sorted(name for near in nearest for name in known[near])
    if key in found:
        users = listed(word) if group == "strategy" else ""
        fix = f"leave it out, or use a strategy that has it: {users}" if users else "leave it out"
        return Problem("unknown_key", f"{key} is not a key of this {group}", fix)
    near = [name for name in found if name.rpartition(".")[0] == group] or found
    fix = f"did you mean {' or '.join(near)}? See --help for all keys" if near else "see --help for the keys"
    return Problem("unknown_key", f"{key} is not a key of the config", fix)


def _misplaced(option: Option[Any], tool: str) -> Problem:
    name, tools = option.name, _listed(option.tools)
    if tool in option.tools:
        message = f"{name} is an option of {tool}, not a key of the config"
        return Problem("misplaced_option", message, f"write it as {name}={option.example}, without a prefix")
    fix = "leave it out, or use a tool that takes it"
    if option is options.NPROC:
        fix = "give torchrun --nproc_per_node=N instead, or use a tool that takes it"
    return Problem("misplaced_option", f"{name} is an option of {tools}, and {tool or 'this'} does not take it", fix)


def _where(option: Option[Any], tool: str) -> str:
    return option.name if tool in option.tools else f"{option.name} (an option of {_listed(option.tools)})"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + names[-1]
