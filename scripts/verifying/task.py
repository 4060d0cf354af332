"""Read the command line of `scripts/verify.py`, choose sizes, and check all that can be checked without a process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from launch.describe.memory import check_memory
from launch.local import check_machine, check_text
from scripts.verifying.sizes import MIXTURE, Typed, Words, choose, needs_mixture, valid_with
from train.command import cli, options
from train.command.presets import names
from train.config.plan import Plan
from train.config.problems import BadInput, Problem, problem_lines
from train.config.schema import Config
from train.data import sources
from train.data.text import Source

ALL = "all"
# The proof takes an SGD step and some AdamW steps with rates of its own, and clips them (train/proof/collecting.py).
OWN = ("optim.name", "optim.lr", "optim.weight_decay", "optim.momentum", "train.clip_norm", "train.eval_batches")
# What belongs to a strategy: one device does without it
OF_STRATEGY = ("strategy=", "strategy.", "train.loss_chunks=", "train.offload_activations=")
MOST_PROCESSES = 16  # up to which another number of processes is looked for, with which a preset can be verified


@dataclass(frozen=True)
class Subject:
    """A strategy to verify. `reference`: the same work on one device. `chosen`: values that the command line leaves
    open, by key. `replaced`: typed words for which the proof has values of its own."""

    config: Config
    reference: Config
    chosen: Words
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What to verify, by the name of the strategy. `left_out`: the presets of strategy=all that cannot be verified
    with this number of processes, each with the reason. `locate`, `html`: the options with these names."""

    nproc: int
    subjects: dict[str, Subject] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    locate: bool | None = None
    html: str = ""

    def wants_place(self, *, differs: bool) -> bool:
        """Whether the first thing that is wrong is searched for a strategy."""
        return differs if self.locate is None else self.locate

    def only(self, names: Iterable[str]) -> Task:
        """The same for some of the strategies."""
        return replace(self, subjects={name: self.subjects[name] for name in names})


def read(argv: Sequence[str], description: str) -> Task:
    """Read the command line. Raises BadInput."""
    argv = [*argv]
    nproc, force, where = options.NPROC.pop(argv), options.FORCE.pop(argv), options.LOCATE.pop(argv)
    parser = cli.parser(options.VERIFY, description)
    parser.add_argument("--html", metavar="FILE", default="", help="write the findings to one self-contained page")
    given = [word for word in argv if word.startswith("strategy=")]
    others = [word for word in argv if word not in given]
    text = given[-1].partition("=")[2] if given else ""
    chosen = names("strategy") if text == ALL else text.split(",") if given else []
    lines = [[f"strategy={name}", *others] for name in chosen] or [others]
    args = parser.parse_intermixed_args(argv)
    if args.help:
        cli.show_help(parser, lines)
    check_page(args.html)
    reader = _Reader(parser, nproc)
    task = _every(reader, lines) if text == ALL else _these(reader, lines)
    for subject in task.subjects.values():
        cli.check(subject.config, nproc)
        _check_dropout(subject.config)
    _check_surroundings([subject.config for subject in task.subjects.values()], nproc, force=force)
    return replace(task, locate=where, html=args.html)


def check_page(path: str) -> None:
    """Raise BadInput if the page cannot be written to this path."""
    folder = os.path.dirname(os.path.abspath(path))
    target = path if os.path.exists(path) else folder
    if path and (not os.path.isdir(folder) or not os.access(target, os.W_OK) or os.path.isdir(path)):
        raise BadInput(
            Problem("html", f"--html {path} cannot be written", "name a file in a folder that can be written")
        )


def _check_dropout(config: Config) -> None:
    if config.model.dropout > 0:
        message = f"model.dropout={config.model.dropout} draws masks that differ from those of one device"
        raise BadInput(Problem("dropout", message, "use model.dropout=0", ("model.dropout=0",)))


def _check_surroundings(configs: Sequence[Config], nproc: int, *, force: bool) -> None:
    """Check the data, the machine and its memory."""
    checked = []
    for config in configs:
        data = (config.data, config.train, config.model.vocab_size)
        if data not in checked:  # reading a large text takes a while
            check_text(config, nproc)
            checked.append(data)
        check_machine(config, nproc, None)
        if not force:
            check_memory(config, nproc)


class _Reader:
    """Makes a `Subject` of each command line. What the lines share is read and composed once."""

    def __init__(self, parser: argparse.ArgumentParser, nproc: int) -> None:
        self.parser, self.nproc = parser, nproc
        self.source: Source | None = None
        self.references: dict[tuple[str, ...], Config] = {}

    def subject(self, line: Sequence[str]) -> Subject:
        """The strategy of a line, with the sizes that are chosen for it. Raises BadInput for a line that cannot be
        composed, but not for broken rules."""
        words = self.words(line)
        config = cli.parse(self.parser, words)[0]
        if self.source is None:  # data=… is the same in all lines
            with suppress(BadInput, OSError):  # _check_surroundings reports it
                self.source = sources.read(config)
        config, mixture = with_mixture(config, words, self.nproc)
        chosen = mixture | choose(Plan(config, self.nproc), Typed(words), self.source)
        config = cli.parse(self.parser, [*_overrides(chosen), *line])[0]
        # degrees and options apply only to the strategy; model, data, batch and precision also to the reference
        shared = [word for word in words if not word.lstrip("+~").startswith(OF_STRATEGY)]
        key = ("strategy=single", *_overrides(chosen), *shared)
        if key not in self.references:
            self.references[key] = cli.configured(key)
        replaced = tuple(word for word in words if word.lstrip("+~").partition("=")[0] in OWN)
        return Subject(config, self.references[key], chosen, replaced)

    def words(self, line: Sequence[str]) -> list[str]:
        return list(self.parser.parse_intermixed_args([*line]).overrides)


def with_mixture(config: Config, words: Sequence[str], nproc: int) -> tuple[Config, Words]:
    """The config with a model that is a mixture of experts, if the strategy needs one and the words choose none."""
    if not needs_mixture(Plan(config, nproc), Typed(words)):
        return config, {}
    chosen = {"model": MIXTURE}
    return cli.configured([*_overrides(chosen), *words]), chosen


def _overrides(chosen: Words) -> list[str]:
    return [f"{key}={value}" for key, value in chosen.items()]


def _these(reader: _Reader, lines: Sequence[Sequence[str]]) -> Task:
    subjects = [reader.subject(line) for line in lines]
    return Task(reader.nproc, {subject.config.strategy.name: subject for subject in subjects})


def _every(reader: _Reader, lines: Sequence[Sequence[str]]) -> Task:
    """The presets that the number of processes and the other words allow. Raises BadInput if there is none."""
    task = Task(reader.nproc)
    errors = []
    for line in lines:
        name = line[0].partition("=")[2]
        try:
            subject = reader.subject(line)
            cli.check(subject.config, reader.nproc)
            task.subjects[name] = subject
        except BadInput as error:
            errors.append(error)
            number = other_number(reader.words(line), reader.nproc)
            task.left_out[name] = _needs(number) if number else problem_lines(error.problems)[0]
    if not task.subjects:
        raise errors[0]
    return task


def _needs(number: int) -> str:
    return f"can run on {number} process" + ("es" if number > 1 else "")


def other_number(words: Sequence[str], nproc: int) -> int:
    """The number of processes next to `nproc`, rather above than below it, with which these words break no rule; 0 if
    there is none up to MOST_PROCESSES, or if they break none with `nproc` either."""
    try:
        config, _ = with_mixture(cli.configured(words), words, nproc)
    except BadInput:
        return 0
    for number in (nproc, *range(nproc + 1, MOST_PROCESSES + 1), *range(nproc - 1, 0, -1)):
        plan = Plan(config, number)
        if valid_with(plan.override(" ".join(_overrides(choose(plan, Typed(words), None)))), None):
            return number if number != nproc else 0
    return 0
