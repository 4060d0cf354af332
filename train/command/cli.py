"""Make a checked `Config` from a command line, by Hydra's compose API. Torch is not imported.

`@hydra.main` is not used: under torchrun it would run in every rank, so that ranks would compete for output folders and
every rank would print the same error. The compose API has the same grammar without these problems: group=option,
key=value, +key=value, ~key.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.command import as_typed
from train.command.help import page
from train.command.help.hints import NO_DASHES, unknown_key
from train.command.overrides import HOW_TO_QUOTE, quoted
from train.command.presets import groups, names, preset_values
from train.command.resources import CONFIG_DIR
from train.command.schemas import SCHEMAS
from train.command.validate import validate
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Composed, Config, Optimiser

EXTRAS = {"torchao": "compress"}  # pip's extra of a package, where it has another name
MAX_COMPOSED = 16  # command lines of a sweep that --help checks
PLANNED = "strategy=auto"  # the planner's layout, which takes its place before a config is composed (planning/auto.py)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BadInput(Problem("command_line", message, NO_DASHES if "unrecognized" in message else "see --help"))


def parser(tool: str, description: str) -> argparse.ArgumentParser:
    """A parser of overrides and of the flags that all entry points have. options.py has the other options of `tool`."""
    result = _Parser(prog=tool, description=description, allow_abbrev=False, add_help=False)
    result.add_argument("overrides", nargs="*")
    result.add_argument("--cfg", choices=["job"])
    result.add_argument("-h", "--help", action="store_true")
    result.add_argument("-m", "--multirun", action="store_true")
    return result


def parse(
    parser: argparse.ArgumentParser, argv: list[str], rank: int = 0
) -> tuple[Config, DictConfig, argparse.Namespace]:
    """Compose the config and check its types. Raises BadInput. Exits with code 0 after --help or --cfg, which only rank
    0 answers."""
    args = parser.parse_intermixed_args(argv)
    if args.multirun:
        raise BadInput(
            Problem(
                "multirun",
                "-m/--multirun starts several runs, but these processes are one run",
                "start one torchrun per run, as python -m launch.sweep does",
            )
        )
    tree = _compose(args.overrides, parser.prog)
    config = _to_config(tree, args.overrides, parser.prog)
    _check_names(tree)
    if args.help or args.cfg:
        if rank == 0:
            print(_help(parser, args.overrides, tree) if args.help else as_typed.yaml(tree).rstrip("\n"))
        raise SystemExit(0)
    return config, tree, args


def show_help(parser: argparse.ArgumentParser, lines: Iterable[Sequence[str]]) -> NoReturn:
    """Answer --help for a command line that expands to several: show the first of them. The others, if they have words
    that are new, are composed too, so that an error in them is reported."""
    composed: list[tuple[list[str], DictConfig]] = []
    seen: set[str] = set()
    for line in lines:
        words = parser.parse_intermixed_args([*line]).overrides
        if not composed or (not seen.issuperset(words) and len(composed) < MAX_COMPOSED):
            composed.append((words, parse(parser, words)[1]))
            seen.update(words)
    print(_help(parser, *composed[0]))
    raise SystemExit(0)


def _help(parser: argparse.ArgumentParser, overrides: list[str], tree: DictConfig) -> str:
    chosen = [word for word in overrides if word.partition("=")[0] in groups()]
    defaults = tree if chosen == overrides else _compose(chosen, parser.prog)
    return page.text(parser.prog, parser.description or "", overrides, tree, defaults)


def configured(overrides: Sequence[str]) -> Config:
    """The config that these overrides compose, without options of an entry point. Raises BadInput."""
    return _to_config(_compose(list(overrides), ""), overrides, "")


def _check_names(tree: DictConfig) -> None:
    """Names are shown everywhere, so they must not contain values from the environment."""
    for typed in as_typed.from_environment(tree):
        if typed.key in ("strategy.name", "model.name"):
            message = f"{typed.key}={typed.text} would name a run with a value from the environment"
            raise BadInput(Problem("name_from_environment", message, "type the name itself"))


def check(config: Config, world_size: int) -> None:
    """Raise BadInput if the config has `problems`."""
    if found := problems(config, world_size):
        raise BadInput(*found)


def problems(config: Config, world_size: int) -> list[Problem]:
    """Every rule that the config breaks, and every optional package that it needs and that is not installed."""
    found = validate(config, world_size)
    needed = {} if config.strategy.extra is None else {f"strategy={config.strategy.name}": config.strategy.extra}
    needed |= {f"metrics.trackers=[{tracker.value}]": tracker.value for tracker in config.metrics.trackers}
    needed |= {"optim=adamw8bit": "torchao"} if config.optim.name is Optimiser.adamw8bit else {}
    for setting, package in needed.items():
        if importlib.util.find_spec(package) is None:
            extra = EXTRAS.get(package, package)
            message, fix = f"{setting} needs {package}, which is not installed", f'pip install "strategy-lab[{extra}]"'
            found.append(Problem("extra", message, fix, exit_code=EXIT_ENVIRONMENT))
    return found


def _compose(overrides: list[str], tool: str) -> DictConfig:
    """Compose the tree. `tool`: the name of the started tool, for hints."""
    overrides = [quoted(override) for override in overrides]
    _store_schemas()
    for override in overrides:
        _check_group(override)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise BadInput(_explain(error, tool)) from error
    except Exception as error:  # for some bad overrides Hydra fails in its own assertions
        raise BadInput(
            Problem("override", f"{' '.join(overrides)} cannot be composed ({error})", "see --help")
        ) from error


@cache
def _store_schemas() -> None:
    """Register the schemas with Hydra, once per process."""
    store = ConfigStore.instance()
    for (group, name), schema in SCHEMAS.items():
        store.store(group=group, name=name, node=schema)


def _check_group(override: str) -> None:
    """`strategy=foo` must name a preset; Hydra's own message would list its search path instead."""
    name, equals, value = override.partition("=")
    group = name.lstrip("+~")
    if group not in groups():
        return
    if override == PLANNED:
        fix = f"use the layout that python -m launch.explain {PLANNED} shows"
        raise BadInput(Problem("auto", f"{override} is not taken here, only where a run is started", fix))
    if name.startswith("~") or not equals or value not in names(group):
        near = difflib.get_close_matches(value, names(group), n=1)
        meant = f"use {group}={near[0]}, or another of" if near else "use"
        raise BadInput(
            Problem("unknown_option", f"{override} does not name a preset", f"{meant} {group}={'|'.join(names(group))}")
        )


def _explain(error: Exception, tool: str) -> Problem:
    """A problem in one line, from the innermost cause of an exception of Hydra or OmegaConf."""
    if isinstance(error, OverrideParseException):
        return Problem(
            "grammar", f"{error.override} is not a valid override", f"use group=preset or key=value; {HOW_TO_QUOTE}"
        )
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    key = getattr(cause, "full_key", None)
    if found := re.search(r"(?:Sweep parameters|Ambiguous value for argument) '(.+)'", text):
        fix = f"use one value, or python -m launch.sweep; {HOW_TO_QUOTE}"
        return Problem("several_values", f"{found[1]} gives several values, but this is one run", fix)
    if found := re.search(r"Key '([^']+)' (?:is )?not in", text):
        return unknown_key(str(key or found[1]), tool)
    if found := re.search(r"Environment variable '(.+)' not found", text):
        fix = f"set it, or give a default: ${{oc.env:{found[1]},default}}"
        return Problem("environment", f"the environment has no {found[1]}", fix, exit_code=EXIT_ENVIRONMENT)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first = lines[0] if lines else str(error)
    return Problem("wrong_type", f"{key}: {first}" if key else first, "see --help for the keys and their types")


def _to_config(tree: DictConfig, overrides: Sequence[str], tool: str) -> Config:
    for path, schema, node in _nodes("", Config, tree):
        fields, keys = {field.name for field in dataclasses.fields(schema)}, set(map(str, node))
        for name in sorted(keys ^ fields):
            key = f"{path}.{name}".lstrip(".")
            if name in fields:
                raise BadInput(Problem("missing_key", f"{key} was removed from the config", "do not remove it"))
            raise BadInput(unknown_key(key, tool))
    try:
        for key in sorted(OmegaConf.missing_keys(tree)):
            raise BadInput(Problem("missing_value", f"{key} has no value", f"use {key}=…"))
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise BadInput(_explain(error, tool)) from error
    assert isinstance(config, Config)
    return Composed(**vars(config), preset=preset_values(overrides))


def _nodes(path: str, schema: type, node: DictConfig) -> Any:
    """Every (path, dataclass, node) of the tree that has a schema."""
    yield path, schema, node
    for name in map(str, node):
        value = node._get_node(name)
        if isinstance(value, DictConfig) and dataclasses.is_dataclass(kind := OmegaConf.get_type(value)):
            yield from _nodes(f"{path}.{name}".lstrip("."), kind, value)
