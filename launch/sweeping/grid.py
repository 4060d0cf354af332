"""The points of a sweep: all combinations of a command line's values in Hydra's grammar, made comparable and checked.

Torch is not imported.

    strategy=dp,tp train.micro_batch_size=range(1,3) nproc=2    gives 4 points
    strategy.layers_per_stage=[3,3,2]                           a list in brackets is one value

Fairness: `global` does not change the global batch. `micro` and `best` scale it, so that each data rank has as many
microbatches as in the first point. `best` then searches for the best micro batch (launch/sweep.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, OverrideParseException

from launch.describe.memory import check_memory
from launch.local import check_machine
from launch.start.device import laid_out
from train.command import cli, options
from train.command.as_typed import from_environment
from train.command.overrides import HOW_TO_QUOTE, quoted
from train.command.validate import completed
from train.config.plan import Plan
from train.config.problems import BadInput, Problem, Reported
from train.config.rules.ranges import shortened
from train.config.schema import Config
from train.data.corpus import load_corpus

GLOBAL, MICRO = "train.global_batch_size", "train.micro_batch_size"
SCALED = {"global": (), "micro": (GLOBAL,), "best": (GLOBAL, MICRO)}  # keys that each fairness mode sets itself
MAX_POINTS = 1_000  # all of them are checked before the first starts


@dataclass(frozen=True)
class Point:
    """A point of a sweep. `label`: the words in which it differs from the other points."""

    label: str
    overrides: tuple[str, ...]
    nproc: int


@dataclass(frozen=True)
class Checked:
    """A point, its plan (None if its config cannot be composed), and all its problems. `microbatches`: per data rank.
    `environment`: the keys whose values come from the environment, each with a hash of its value."""

    point: Point
    plan: Plan | None
    microbatches: int
    problems: tuple[Problem, ...]
    environment: tuple[str, ...] = ()

    def sized(self, micro_batch: int) -> list[str]:
        """Overrides that set another micro batch, with the same number of microbatches."""
        assert self.plan is not None
        return [f"{MICRO}={micro_batch}", f"{GLOBAL}={micro_batch * self.plan.data_ranks * self.microbatches}"]


class InvalidPoints(Reported):
    """Some points cannot be run, and nothing was started."""

    def __init__(self, checked: Sequence[Checked], fairness: str) -> None:
        self.checked, self.fairness = checked, fairness
        self.invalid = [one for one in checked if one.problems]
        self.exit_code = min(problem.exit_code for one in self.invalid for problem in one.problems)
        super().__init__(self.report())

    def report(self) -> str:
        total, good = len(self.checked), len(self.checked) - len(self.invalid)
        lines = [f"{len(self.invalid)} of {total} point(s) cannot be run, nothing was trained:"]
        lines += invalid_lines(self.invalid, "every point" if not good and total > 1 else "")
        first = next((one for one in self.checked if one.microbatches), None)
        if self.fairness != "global" and first:
            lines.append(
                f"batch={self.fairness} gives every point {first.microbatches} microbatch(es) per data rank, as "
                f"many as the first, {first.point.label}, has: a larger {GLOBAL} gives more to all of them"
            )
        return "\n".join([*lines, f"skip_invalid=true runs the other {good}"] if good else lines)


def expand(words: Sequence[str]) -> list[Point]:
    """All combinations without duplicates; the value of the last word changes fastest. Raises BadInput if a word is not
    a valid override."""
    axes: list[list[tuple[str, bool]]] = []  # for each word: its values, and whether labels show them
    for word, override in _parsed(words):
        if override.is_sweep_override():
            axes.append([(f"{override.get_key_element()}={value}", True) for value in _values(override)])
        else:
            axes.append([(word, override.key_or_group == "strategy")])
    if math.prod(len(axis) for axis in axes) > MAX_POINTS:
        raise BadInput(Problem("grid", f"these values make more than {MAX_POINTS:,} points", "use fewer of them"))
    points = []
    for combination in itertools.product(*axes):
        overrides = [word for word, _ in combination]
        nproc = options.NPROC.pop(overrides)
        shown = [word.removeprefix("strategy=") for word, named in combination if named]
        points.append(Point(" ".join(shown) or "run", tuple(overrides), nproc))
    return list(dict.fromkeys(points))


def check_all(parser: ArgumentParser, points: Sequence[Point], fairness: str, *, force: bool = False) -> list[Checked]:
    """All points in the same order, with their problems. Nothing is started. `force`: memory is not checked."""
    checked: list[Checked] = []
    read: dict[str, tuple[Problem, ...]] = {}  # the problems of each text, which many points share
    for point in points:
        microbatches = next((one.microbatches for one in checked if one.plan), 0)
        checked.append(_check(parser, point, fairness, microbatches, read, force))
    folders = {one.plan.config.metrics.dir for one in checked if one.plan}
    if len(folders) > 1:
        message = f"metrics.dir differs between the points ({', '.join(sorted(folders))}), but a sweep has one folder"
        raise BadInput(Problem("metrics_dir", message, "use one metrics.dir"))
    return checked


def invalid_lines(invalid: Sequence[Checked], everything: str = "") -> list[str]:
    """Lines with every problem once, below the points that have it. `everything`: a name for all points together."""
    labels: dict[str, list[str]] = {}
    for one in invalid:
        for problem in one.problems:
            labels.setdefault(str(problem), []).append(one.point.label)
    lines = []
    for text, names in labels.items():
        lines.append("  " + (everything if everything and len(names) == len(invalid) else ", ".join(names)))
        lines.append(f"    {text}")
    return lines


def _check(
    parser: ArgumentParser,
    point: Point,
    fairness: str,
    microbatches: int,
    read: dict[str, tuple[Problem, ...]],
    force: bool,
) -> Checked:
    try:
        config, tree, _ = cli.parse(parser, laid_out(point.overrides, point.nproc, kept=1)[0])
    except BadInput as error:
        return Checked(point, None, microbatches, error.problems)
    plan = Plan(config, point.nproc)
    unit = config.train.micro_batch_size * plan.data_ranks
    if unit > 0:
        microbatches = microbatches or max(config.train.global_batch_size // unit, 1)
        if fairness != "global":
            word = f"{GLOBAL}={unit * microbatches}"
            plan = plan.override(word)
            label = f"{point.label} {word}" if fairness == "micro" else point.label
            point = dataclasses.replace(point, label=label, overrides=(*point.overrides, word))
    environment = tuple(f"{typed.key}={typed.digest}" for typed in from_environment(tree))
    return Checked(point, plan, microbatches, _problems(plan.config, point.nproc, read, force), environment)


def _problems(config: Config, nproc: int, read: dict[str, tuple[Problem, ...]], force: bool) -> tuple[Problem, ...]:
    """The problems that launch.local would find: of the config, or else of the text, or else of the machine."""
    try:
        cli.check(config, nproc)
        windows = (config.train.seq_len, config.train.eval_batches, config.train.global_batch_size)
        text = repr((config.data, windows, config.model.vocab_size))
        if text not in read:
            read[text] = _problems_of_text(config)
        if read[text]:
            return tuple(completed(problem, Plan(config, nproc)) for problem in read[text])
        check_machine(config, nproc, None)
        if not force:
            check_memory(config, nproc)
    except BadInput as error:
        return error.problems
    return ()


def _problems_of_text(config: Config) -> tuple[Problem, ...]:
    try:
        load_corpus(config)
    except BadInput as error:
        return error.problems
    return ()


def _parsed(words: Sequence[str]) -> list[tuple[str, Override]]:
    """Each word as it was typed, with Hydra's parse of it."""
    parser, found = OverridesParser.create(), []
    for word in words:
        try:
            found += [(word, override) for override in parser.parse_overrides([quoted(word)])]
        except (OverrideParseException, ValueError) as error:  # ValueError: a number with thousands of digits
            fix = f"use key=value, key=a,b or key=range(1,5); {HOW_TO_QUOTE}"
            raise BadInput(Problem("grammar", f"{shortened(word)} is not a valid override", fix)) from error
    return found


def _values(override: Override) -> list[str]:
    countable = override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP
    try:
        # one more than the maximum is enough: a range may have a thousand million values
        values = [*itertools.islice(override.sweep_string_iterator(), MAX_POINTS + 1)] if countable else []
    except (HydraException, ValueError) as error:
        raise BadInput(
            Problem("grammar", f"{override.input_line}: {error}", "use key=a,b or key=range(1,5)")
        ) from error
    if not values:
        message = f"{override.input_line} does not give a list of values"
        raise BadInput(Problem("grammar", message, "use key=a,b or key=range(1,5)"))
    return values
