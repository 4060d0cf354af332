"""Writes docs/museum.md from the exhibits and their outcomes."""

import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence

from tests import museum, planted
from tests.museum import words
from tests.museum.base import Exhibit
from tests.museum.exhibits.chapters import CHAPTERS
from tests.museum.running import Outcome

COMMAND = "python -m tests.museum && python -m tests.museum --write"


def page(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """The whole page. An exhibit without an outcome is on it too, and is said not to have been run."""
    parts = [introduction(exhibits, outcomes)]
    for kind, (heading, text) in CHAPTERS.items():
        chosen = [exhibit for exhibit in exhibits if exhibit.kind == kind]
        if chosen:
            parts += [f"## {heading}\n\n{text}", *(entry(exhibit, outcomes.get(exhibit.bug)) for exhibit in chosen)]
    parts += [f"## The score\n\n{words.score(outcomes.values(), len(exhibits))}.", table(exhibits, outcomes)]
    return "\n\n".join(parts) + "\n"


def introduction(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    world = sum(exhibit.bug in museum.BUGS and exhibit.source is not None for exhibit in exhibits)
    projects = {exhibit.source.project for exhibit in exhibits if exhibit.source}
    commits = " and ".join(sorted({outcome.commit for outcome in outcomes.values()})) or "none"
    versions = " and ".join(sorted({outcome.torch for outcome in outcomes.values()})) or "none"
    return f"""# A museum of real bugs

<!-- written by `{COMMAND}`: change the exhibits in tests/museum, not this page -->

Training on several devices goes wrong silently. A program that shards badly runs, its loss falls, and its model is
worse than it should be; somebody finds out weeks later, or never. This page shows {len(exhibits)} such bugs. {world} of
them were published by the people who found them, in {len(projects)} projects, and were then planted into this lab's own
functions, in the place where one would make them here. The others are the lab's own. Each was planted alone, and the
proof ([proof.md](proof.md)) was asked whether the strategy still equals one device.

{lessons(exhibits, outcomes)}

How to read an entry: what was published comes first, with its source and how long it lived, as far as its tracker
says. Then comes what was planted here, and in which run: the words are overrides of the command line, `ws` is the
number of processes. "The proof" names the columns that differ, and by how many times its bound. "The localiser" names
the module whose output, or whose output's gradient, is the first wrong one, or the part of the update; the mesh axis;
and the kind of mistake.

The results are of commit {commits}, torch {versions}, on a machine with 2 CPU cores, by `{COMMAND}`."""


def lessons(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """What the outcomes have in common, in numbers."""
    caught = [outcome for outcome in outcomes.values() if outcome.caught]
    silent = [o for o in caught if "loss" not in o.red]
    late = [o for o in caught if error(o, "adamw_loss") < 1e-3]
    right = [o for o in caught if "gradients" not in o.red]
    only = Counter(next(iter(o.red)) for o in caught if len(o.red) == 1)
    parts = ", ".join(f"{count} by `{column}`" for column, count in only.most_common())
    axes = Counter(exhibit.axis or "none" for exhibit in exhibits).most_common()
    kinds = Counter(exhibit.kind for exhibit in exhibits).most_common(3)
    often = [f"{count} are of the kind “{kind}”" for kind, count in kinds]
    return f"""What people really get wrong is rarely an algorithm. It is bookkeeping. Of these bugs,
{", ".join(often)}.

- **The loss says little.** {len(silent)} of the {len(caught)} bugs that were caught leave the loss of the first step
  right. After three steps of AdamW, the loss of {len(late)} differs by less than a thousandth.
- **Right gradients are not enough.** In {len(right)} cases every gradient of the first step is right, and the norm, the
  clipping, the update, the evaluation or the next step is wrong.
- **One column is not enough.** {sum(only.values())} bugs are seen by one column alone: {parts or "none"}.
- **Every axis has its bugs**: {", ".join(f"{axis} {count}" for axis, count in axes)}."""


def error(outcome: Outcome, column: str) -> float:
    return next((verdict.error for verdict in outcome.verdicts if verdict.column == column), math.inf)


def entry(exhibit: Exhibit, outcome: Outcome | None) -> str:
    bug = (museum.BUGS | planted.BUGS)[exhibit.bug]
    done = " ".join(inspect.getdoc(bug).split())  # type: ignore[union-attr]
    source = exhibit.source
    told = f"[{source.project}#{source.number}]({source.url}). {source.what} *{source.lived}.*" if source else ""
    about = [f"### {exhibit.bug.replace('_', ' ').capitalize()}", told, f"Planted as `{exhibit.bug}`: {done}"]
    run = exhibit.row.name.partition(" BUG:")[0]
    if outcome is None:
        about.append(f"- `{run}`: not run yet")
    else:
        verdict = words.margins(outcome) or outcome.problem or "no column differs"
        about.append(
            f"- `{run}`\n- The proof: {'differs' if outcome.caught else 'NOT CAUGHT'}. {verdict}\n"
            f"- The localiser: {words.located(outcome)}"
        )
    return "\n\n".join(part for part in about if part)


def table(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """One line for each exhibit."""
    lines = ["| bug | caught | module and axis | kind |", "|---|---|---|---|"]
    for exhibit in exhibits:
        found = outcomes.get(exhibit.bug)
        asked = found is not None and found.finding is not None
        cells = (found and found.caught, asked and found.place_found, asked and found.kind_found)  # type: ignore[union-attr]
        known = (found is not None, asked, asked)
        said = [
            ("yes" if cell else "**no**") if is_known else "not run"
            for cell, is_known in zip(cells, known, strict=True)
        ]
        lines.append(f"| `{exhibit.bug}` | {' | '.join(said)} |")
    return "\n".join(lines)
