"""The top of a report: what was trained, on which machine, by which command; and whether the runs did the same work."""

from __future__ import annotations

import shlex
from typing import Any

from scripts.comparing import words
from scripts.comparing.gate import Group
from scripts.comparing.runs import Run
from scripts.comparing.work import facts_of
from train.command.resources import words_of
from train.record.run_files import clean

MOST_SHOWN = 3  # the most values of one fact that are shown
MACHINE = ("device", "platform")
SOFTWARE = {"torch": "torch {}", "python": "Python {}", "commit": "commit {}"}


def facts(groups: list[Group], argv: list[str]) -> dict[str, str]:
    """The names and values of the facts. If runs differ, all values are shown or, if there are many, their number."""
    runs = [row.run for group in groups for row in group.rows]
    found = {name: _each([facts_of(run).get(name) for run in runs]) for name in _names(runs)}
    found["machine"] = _each([_machine(run) for run in runs])
    found["software"] = _each([_software(run) for run in runs])
    found["processes"] = _each([run.world_size for run in runs])
    found["command"] = command(runs)
    found["this page"] = shlex.join(["python", *words_of("scripts/compare.py"), *argv]) if argv else ""
    return {name: value for name, value in found.items() if value}


def command(runs: list[Run]) -> str:
    """The command of the sweep if all runs belong to one sweep; of the run if there is only one; else a hint where the
    commands are listed."""
    sweeps = {run.sweep.line if run.sweep else "" for run in runs}
    if len(sweeps) == 1 and (line := sweeps.pop()):
        return f"python -m launch.sweep {line}"
    commands = list(dict.fromkeys(clean(run.facts["command"]) for run in runs if "command" in run.facts))
    if len(commands) == 1 and len(runs) == 1:
        return commands[0]
    return "one for each run: see Environment" if commands else ""


def verdict(group: Group) -> str:
    """A sentence that says whether the runs of a table did the same work and have the same losses."""
    count = len(group.rows)
    if not group.heading.startswith("Same work") or count < 2:
        return ""
    wrong = [row.run.label for row in group.rows if not row.good]
    excused = [row.run.label for row in group.rows if row.excused]
    work = "the same model on the same tokens with the same optimiser"
    same = f"{'Both' if count == 2 else f'All {count}'} runs train {work}, so their losses must be equal"
    if wrong:
        they = "they are" if len(wrong) > 1 else "it is"
        return f"{same}: those of {words.listed(wrong)} are not, so {they} not ranked below."
    if excused:
        return f"{same}, and are, except those of {words.listed(excused)}, which a lossy option allows to differ."
    apart = [row.figures.get("loss_difference") for row in group.rows]
    largest = max((value for value in apart if value is not None), default=0.0)
    return f"{same}, and are (at most {largest:.1e} apart in the first steps, which is rounding)."


def _names(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in facts_of(run)))


def _machine(run: Run) -> str | None:
    return ", ".join(clean(run.facts[name], 80) for name in MACHINE if run.facts.get(name)) or None


def _software(run: Run) -> str | None:
    return ", ".join(text.format(clean(run.facts[k], 40)) for k, text in SOFTWARE.items() if run.facts.get(k)) or None


def _each(values: list[Any]) -> str:
    seen = list(dict.fromkeys(clean(value) for value in values if value is not None))
    return "; ".join(seen) if len(seen) <= MOST_SHOWN else f"{len(seen)} values, see below"
