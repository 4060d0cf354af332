"""The text of `--help`: what the tool does, its options, and every key of the config that the command line composes.

Each key is shown with its value, its type with range or choices, and its sentence. Torch is not imported.
"""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from train.command import options, presets
from train.command.help import described
from train.command.overrides import HOW_TO_QUOTE
from train.command.resources import CONFIG_DIR
from train.config.schema import Config

COLUMN = 36  # the column in which types begin
NARROWEST, WIDEST = 60, 120
HTML = ("--html FILE", "", "Show as a page where a strategy goes wrong: the model as a column of boxes.")
JSON = ("--json", "", "Print what was found as JSON, for programs.")
OWN = {options.VERIFY: [HTML], options.DOCTOR: [JSON], options.PLAN: [JSON]}  # flags that only one tool has
CFG = ("--cfg job", "", "Print the composed config and stop.")
HELP = ("-h, --help", "", "Print this text for the config that the overrides compose, and stop.")


def text(tool: str, description: str, overrides: list[str], tree: DictConfig, defaults: DictConfig) -> str:
    """The whole text. `tree`: the composed config. `defaults`: the config without the overrides of single keys."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    words = [f"[{one.name}={one.example}]" for one in options.of(tool)]
    words += [f"[{flag}]" for flag, *_ in OWN.get(tool, [])]
    lines = [*_wrapped(f"usage: {' '.join([tool, *words])} [override ...]", width, "       "), ""]
    lines += _paragraphs(description, width)
    lines += ["", "Options"]
    for one in options.of(tool):
        left, unset = (
            (f"{one.name}=N", f" (default: {one.unset})") if one.unset else (f"{one.name}={one.shown_default}", "")
        )
        lines += _entry(left, one.must + unset, one.help, width)
    flags = [HELP] if tool in (options.SWEEP, options.NETLAB) else [CFG, HELP]  # they have several configs
    for flag in [*OWN.get(tool, []), *flags]:
        lines += _entry(*flag, width)
    lines += ["", "Overrides"]
    how = "group=preset chooses a preset, and key=value sets one key; if a key is given twice, the last value counts"
    lines += _wrapped(f"  {how}; {HOW_TO_QUOTE}.", width, "  ")
    values = OmegaConf.to_container(tree, enum_to_str=True)
    before = OmegaConf.to_container(defaults, enum_to_str=True)
    of_no_group = {key.name: key for key in described.keys(Config, "")}
    for field in dataclasses.fields(Config):
        lines.append("")
        if field.name in of_no_group:
            lines += _key(of_no_group[field.name], values, before, width)
            continue
        lines += _heading(field, overrides, width)
        schema = OmegaConf.get_type(tree, field.name)
        assert schema is not None
        for key in described.keys(schema, field.name):
            lines += _key(key, values, before, width)
    return "\n".join(lines)


def chosen_preset(group: str, overrides: list[str]) -> str:
    """The preset of a group: the last one that the overrides name, or else that of configs/config.yaml."""
    names = [word.partition("=")[2] for word in overrides if word.startswith(f"{group}=")]
    if names:
        return names[-1]
    root = cast(DictConfig, OmegaConf.load(CONFIG_DIR / "config.yaml"))
    return str(next(one[group] for one in root.defaults if isinstance(one, DictConfig) and group in one))


def _heading(field: dataclasses.Field[Any], overrides: list[str], width: int) -> Iterator[str]:
    group, sentence = field.name, field.metadata["help"]
    if group not in presets.groups():
        yield from _wrapped(f"{group}: {sentence}", width, "  ")
        return
    preset = chosen_preset(group, overrides)
    yield from _wrapped(f"{group}={preset}: {sentence}", width, "  ")
    if said := described.preset_help(group, preset):
        yield from _wrapped(f"  {preset}: {said}", width, "    ")
    yield from _wrapped(f"  Presets: {', '.join(presets.names(group))}", width, "    ")


def _key(key: described.Key, values: Any, before: Any, width: int) -> Iterator[str]:
    value, default = (described.written(_at(tree, key.name)) for tree in (values, before))
    room = width - 4 - len(key.name)
    shown = value if len(value) <= room else f"{value[: room - 1]}…"
    kind = key.values if value == default else f"{key.values} (default {default})"
    return _entry(f"{key.name}={shown}", kind, key.help, width)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def _entry(left: str, right: str, sentence: str, width: int) -> Iterator[str]:
    """`left`, then `right` from COLUMN on, then the sentence on the lines below."""
    line = f"  {left}"
    if right and len(line) >= COLUMN:
        yield line
        line = ""
    yield from _wrapped(f"{line:<{COLUMN}}{right}".rstrip(), width, " " * COLUMN)
    yield from _wrapped(f"      {sentence}", width, "      ") if sentence else ()


def _paragraphs(text: str, width: int) -> list[str]:
    """Paragraphs wrapped to the width. A paragraph with indented lines is not changed."""
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        as_it_is = any(line.startswith(" ") for line in paragraph.splitlines())
        lines += ["", *(paragraph.splitlines() if as_it_is else _wrapped(" ".join(paragraph.split()), width, ""))]
    return lines[1:]


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
