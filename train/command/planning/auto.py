"""`strategy=auto`: the planner's best layout, as words that take its place on the command line.

The choice is a function of the command line, the number of processes and the figures of the device, and of nothing
else: nothing is measured, so all ranks choose the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from train.command import cli
from train.command.planning import constants
from train.command.planning.hardware import AUTO, file_named, measured, published, replaced
from train.command.planning.job import missing_figures, of_plan
from train.command.planning.search.layouts import MICRO, RECOMPUTE, Choices
from train.command.planning.search.pricer import Task
from train.command.planning.search.refusals import check_config, refused
from train.command.planning.search.search import Outcome, search
from train.command.planning.search.words import shown, why_slower
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.schema import Config, HardwareConfig
from train.strategies.spmd import Spmd

WORD, STANDS_IN = cli.PLANNED, "strategy=single"
DEFAULTS = {"cpu": "cpu_default"}  # the figures for a device of which too little is known
OTHER = "a100_sxm"
KEPT = 50  # layouts that are replayed: fewer than launch.plan's, as every rank waits for its own search


@dataclass(frozen=True)
class Choice:
    """`words`: of the layout. `lines`: what it is and why, for the user."""

    words: tuple[str, ...]
    lines: tuple[str, ...]


def asked(words: Sequence[str]) -> bool:
    """Whether the command line asks for the planner's layout."""
    return WORD in words


def asks_for_help(words: Sequence[str]) -> bool:
    return any(word in ("-h", "--help") for word in words)


def stood_in(words: Sequence[str]) -> list[str]:
    """The command line with one device in place of the layout: for --help, which needs no layout."""
    return [STANDS_IN if word == WORD else word for word in words]


def in_place(words: Sequence[str], layout: Sequence[str]) -> list[str]:
    """The command line with the words of a layout instead of `strategy=auto`."""
    others = [word for word in words if word != WORD and word.lstrip("+").partition("=")[0] not in (MICRO, RECOMPUTE)]
    return [*others, *layout]


def standing(words: Sequence[str]) -> Config:
    """The config of the command line, with one device in place of the layout."""
    return cli.configured([STANDS_IN, *(word for word in words if word != WORD and not word.startswith("-"))])


def refuse_strategy(words: Sequence[str], who: str = WORD) -> None:
    """Raise BadInput for keys of a strategy, which is not known yet. `who`: what chooses it."""
    for word in words:
        if word.lstrip("+~").startswith(("strategy.", "strategy=")) and word != WORD:
            message = f"{word} is given, but {who} chooses the strategy and all its keys"
            raise BadInput(Problem("auto", message, f"leave {word} out"))


def choices_of(words: Sequence[str], config: Config) -> Choices:
    """What the command line sets itself."""
    keys = {word.lstrip("+").partition("=")[0] for word in words}
    return Choices(
        config.train.micro_batch_size if MICRO in keys else None,
        config.train.activation_checkpointing if RECOMPUTE in keys else None,
    )


def figures(config: Config, device: str, nproc: int) -> tuple[HardwareConfig, bool]:
    """(The figures of the hardware that the config names; else the first that are enough for such runs, of a profile
    and the data sheet of the device, and of a default; whether they were measured)."""
    given = config.hardware
    if given.name != AUTO:
        return given, bool(given.measured)
    found, default = published(given, device), replaced(file_named(DEFAULTS.get(device, OTHER)), given)
    own = [] if found.name == AUTO else [found]
    if own:
        default = dataclasses.replace(default, memory_gib=found.memory_gib)
    known = [*measured(given, device), *own, default]
    best = next((one for one in known if _is_enough(config, one, nproc)), found if own else default)
    return dataclasses.replace(best, match=None), bool(best.measured)  # rules refuse `match` outside its file


def _is_enough(config: Config, hardware: HardwareConfig, nproc: int) -> bool:
    """Whether the figures say how long runs of the config take in which all processes talk to each other."""
    strategy = Spmd(name="dp", dp_replicate=-1)
    plan = Plan(dataclasses.replace(config, hardware=hardware, strategy=strategy), nproc)
    return not missing_figures(of_plan(plan))


def choose(words: Sequence[str], nproc: int, device: str, *, kept: int = KEPT) -> Choice:
    """The planner's layout for a command line with `strategy=auto`. `device`: its name by the driver, `cpu` for a CPU.
    Raises BadInput: the config has problems in every layout, figures are missing, or no layout fits."""
    refuse_strategy(words)
    config = standing(words)
    hardware, calibrated = figures(config, device, nproc)
    base = Plan(dataclasses.replace(config, hardware=hardware), nproc)
    check_config(base)
    task = Task(base, config.precision.value, constants.load(), choices_of(words, config), kept)
    outcome = search(task)
    if not outcome.best:
        raise BadInput(refused(task, outcome))
    return Choice(tuple(outcome.best[0].layout.words), _lines(outcome, hardware.name, calibrated=calibrated))


def _lines(outcome: Outcome, hardware: str, *, calibrated: bool) -> tuple[str, ...]:
    best, others = outcome.best[0], outcome.best[1:]
    speed = best.time.tokens_per_s_per_device * best.time.devices
    source = f"hardware={hardware}" + ("" if calibrated else " (uncalibrated: run scripts/matmul.py)")
    first = f"{WORD} takes {best.layout.name}: {shown(best.layout)}; {speed:,.0f} tokens/s predicted for {source}"
    known = outcome.valid - sum(outcome.unknown.values())
    lacking = "".join(f" ({count:,} more lack {name})" for name, count in outcome.unknown.items())
    why = f"it is the best of {known:,} valid layouts{lacking}"
    return first, f"{why}: {why_slower(best, others[0])}" if others else f"{why}, and the only one that fits."
