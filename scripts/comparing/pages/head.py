"""What stands at the top of a report: what was trained, on what, by which command; and whether it is one work."""

from __future__ import annotations

import shlex
from typing import Any

from scripts.comparing import words
from scripts.comparing.gate import Group
from scripts.comparing.runs import Run
from scripts.comparing.work import facts_of
from train.command.resources import words_of
from train.record.run_files import clean

MOST_SHOWN = 3  # values of one fact that the head has room for
MACHINE = ("device", "platform")
SOFTWARE = {"torch": "torch {}", "python": "Python {}", "commit": "commit {}"}


def facts(groups: list[Group], argv: list[str]) -> dict[str, str]:
    """Name and value; where runs do not share a value, the values, or how many there are."""
    runs = [row.run for group in groups for row in group.rows]
    found = {name: _each([facts_of(run).get(name) for run in runs]) for name in _names(runs)}
    found["machine"] = _each([_machine(run) for run in runs])
    found["software"] = _each([_software(run) for run in runs])
    found["processes"] = _each([run.world_size for run in runs])
    found["command"] = command(runs)
    found["this page"] = shlex.join(["python", *words_of("scripts/compare.py"), *argv]) if argv else ""
    return {name: value for name, value in found.items() if value}


def command(runs: list[Run]) -> str:
    """The sweep's line if all runs are of one sweep; the run's if there is one; else where each run's stands."""
    sweeps = {run.sweep.line if run.sweep else "" for run in runs}
    if len(sweeps) == 1 and (line := sweeps.pop()):
        return f"python -m launch.sweep {line}"
    commands = list(dict.fromkeys(clean(run.facts["command"]) for run in runs if "command" in run.facts))
    return commands[0] if len(commands) == 1 and len(runs) == 1 else "one a run: see Environment" if commands else ""


def verdict(group: Group) -> str:
    """Whether the runs of a table did the same work and came to the same losses, in a sentence."""
    count = len(group.rows)
    if not group.heading.startswith("Same work") or count < 2:
        return ""
    wrong = [row.run.label for row in group.rows if not row.good]
    excused = [row.run.label for row in group.rows if row.excused]
    work = "the same model on the same tokens with the same optimiser"
    same = f"{'Both' if count == 2 else f'All {count}'} runs train {work}, so their losses must be equal"
    if wrong:
        they = "they win" if len(wrong) > 1 else "it wins"
        return f"{same}: those of {words.listed(wrong)} are not, so {they} nothing below."
    if excused:
        return f"{same}, and are, but for {words.listed(excused)}, which may differ by a lossy option."
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
