"""Writes docs/museum.md from the exhibits and their outcomes."""

import inspect
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from tests import museum, planted
from tests.museum import words
from tests.museum.base import Exhibit
from tests.museum.exhibits.chapters import CHAPTERS, SHORT
from tests.museum.running import Outcome

WIDTH = 125  # columns of the page
COMMAND = "python -m tests.museum; python -m tests.museum --write"


def page(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """The whole page. An exhibit without an outcome is on it too, and is said not to have been run."""
    parts = [introduction(exhibits, outcomes)]
    for kind, (heading, text) in CHAPTERS.items():
        chosen = [exhibit for exhibit in exhibits if exhibit.kind == kind]
        if chosen:
            parts += [f"## {heading}\n\n{wrapped(text)}"]
            parts += [entry(exhibit, outcomes.get(exhibit.bug)) for exhibit in chosen]
    score = f"{words.score(outcomes.values(), len(exhibits))}."
    parts += [f"## The score\n\n{wrapped(score)}", wrapped(fairness(exhibits, outcomes)), table(exhibits, outcomes)]
    return "\n\n".join(parts) + "\n"


def introduction(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    world = sum(exhibit.bug in museum.BUGS and exhibit.source is not None for exhibit in exhibits)
    projects = {exhibit.source.project for exhibit in exhibits if exhibit.source}
    commits = " and ".join(sorted({outcome.commit for outcome in outcomes.values()})) or "none"
    versions = " and ".join(sorted({outcome.torch for outcome in outcomes.values()})) or "none"
    paragraphs = (
        "Training on several devices goes wrong silently. A program that shards badly runs, its loss falls, and its "
        "model is worse than it should be; somebody finds out weeks later, or never. This page shows "
        f"{len(exhibits)} such bugs. {world} of them were published by the people who found them, in {len(projects)} "
        "projects, and were then planted into this lab's own functions, in the place where one would make them here. "
        "The others are the lab's own. Each was planted alone, and the proof ([proof.md](proof.md)) was asked whether "
        "the strategy still equals one device.",
        lessons(exhibits, outcomes),
        "How to read an entry: what was published comes first, with its source and how long it lived, as far as its "
        "tracker says. Then comes what was planted here, and in which run: the words are overrides of the command "
        "line, `ws` is the number of processes. “The proof” names the columns that differ, and by how many times its "
        "bound. “The localiser” names the module whose output, or whose output's gradient, is the first wrong one, or "
        "the part of the update; the mesh axis; and the kind of mistake.",
        f"The results are of commit {commits}, torch {versions}, on a machine with 2 CPU cores, by `{COMMAND}`.",
    )
    head = f"# A museum of real bugs\n\n<!-- written by `{COMMAND}`: change tests/museum, not this page -->"
    return "\n\n".join([head, *(text if "\n" in text else wrapped(text) for text in paragraphs)])


def lessons(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """What the outcomes have in common, in numbers."""
    caught = [outcome for outcome in outcomes.values() if outcome.caught]
    silent = [o for o in caught if "loss" not in o.red]
    late = [o for o in caught if error(o, "adamw_loss") < 1e-3]
    right = [o for o in caught if "gradients" not in o.red]
    only = Counter(next(iter(o.red)) for o in caught if len(o.red) == 1)
    parts = ", ".join(f"{count} by `{column}`" for column, count in only.most_common())
    axes = Counter(exhibit.axis or "no axis" for exhibit in exhibits).most_common()
    kinds = Counter(exhibit.kind for exhibit in exhibits).most_common(3)
    often = ", ".join(f"{count} {SHORT[kind]}" for kind, count in kinds)
    points = (
        f"**The loss says little.** {len(silent)} of the {len(caught)} bugs that were caught leave the loss of the "
        f"first step right. After three steps of AdamW, the loss of {len(late)} differs by less than a thousandth.",
        f"**Right gradients are not enough.** In {len(right)} cases every gradient of the first step is right, and the "
        "norm, the clipping, the update, the evaluation or the next step is wrong.",
        f"**One column is not enough.** {sum(only.values())} bugs are seen by one column alone: {parts or 'none'}.",
        f"**Every axis has its bugs**: {', '.join(f'{axis} {count}' for axis, count in axes)}.",
    )
    lead = f"What people really get wrong is rarely an algorithm. It is bookkeeping. Of these bugs, {often}."
    return "\n".join([wrapped(lead), "", *map(bullet, points)])


def error(outcome: Outcome, column: str) -> float:
    return next((verdict.error for verdict in outcome.verdicts if verdict.column == column), math.inf)


def entry(exhibit: Exhibit, outcome: Outcome | None) -> str:
    bug = (museum.BUGS | planted.BUGS)[exhibit.bug]
    done = " ".join(inspect.getdoc(bug).split())  # type: ignore[union-attr]
    source = exhibit.source
    told = f"[{source.project}#{source.number}]({source.url}). {source.what} *{source.lived}.*" if source else ""
    run = exhibit.row.name.partition(" BUG:")[0]
    if outcome is None:
        said = [f"`{run}`: not run yet"]
    else:
        verdict = words.margins(outcome) or outcome.problem or "no column differs"
        said = [
            f"`{run}`",
            f"The proof: {'differs' if outcome.caught else '**NOT CAUGHT**'}. {verdict}",
            f"The localiser: {words.located(outcome)}{quoted(outcome)}",
        ]
    title = exhibit.bug.replace("_", " ").capitalize()
    paragraphs = [wrapped(told), wrapped(f"Planted as `{exhibit.bug}`: {done}"), "\n".join(map(bullet, said))]
    return "\n\n".join([f"### {title}", *filter(None, paragraphs)])


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def bullet(text: str) -> str:
    return wrapped(f"- {text}", "  ")


def quoted(outcome: Outcome) -> str:
    return f". “{outcome.finding['sentence']}”" if outcome.finding else ""


def fairness(exhibits: Sequence[Exhibit], outcomes: Mapping[str, Outcome]) -> str:
    """What one must know about the score: what was changed after the localiser had been seen."""
    asked = [outcome for outcome in outcomes.values() if outcome.finding is not None]
    first = [o.exhibit.before or (o.exhibit.module, o.exhibit.axis, o.exhibit.kind) for o in asked]
    places = sum(o.finds(module, axis) for o, (module, axis, _) in zip(asked, first, strict=True))
    kinds = sum(o.names(kind) for o, (_, _, kind) in zip(asked, first, strict=True))
    changed = ", ".join(f"`{exhibit.bug}`" for exhibit in exhibits if exhibit.before)
    return (
        "The localiser was made while these exhibits existed, and was tried on them: the score says how much of what "
        "is known it recognises, and for a new bug it may do worse. What it should say was written down before it was "
        f"first run. Some of these expectations were changed afterwards: {changed}. A mistake in a kernel's backward "
        "is now expected at the kernel, whose input has the first wrong gradient, and no longer at the module before "
        "it; rows or tokens of others count as stale values. A finding that names a module's input, such as "
        "`kernel:v`, counts as "
        f"one that names the module. With the first expectations the score is {places} of {len(exhibits)} for the "
        f"place and {kinds} of {len(exhibits)} for the kind. Two plants were changed after a first run too: "
        "`mean_of_microbatch_means` also took the mean over ranks, and `full_bucket_not_reduced` began to act in the "
        "second step only."
    )


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
