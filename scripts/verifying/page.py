"""A self-contained page of where strategies go wrong: the model as a column of boxes, forward and backward."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

from scripts.verifying.report import Judgement, layout
from train.proof.locating.finding import Box, Finding

STYLE = """
:root { --page: #fafaf8; --card: #fff; --ink: #1c1d1f; --soft: #61656b; --line: #dcdcd6;
  --right: #d9efdd; --wrong: #f8d4cf; --first: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #141517; --card: #1d1f22; --ink: #e8e8e4; --soft: #a2a6ad;
  --line: #3a3d42; --right: #1f3d29; --wrong: #57241f; --first: #ff9b91; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h2 { margin: 2rem 0 .5rem; font-size: 1.15rem; }
table { border-collapse: separate; border-spacing: .3rem .2rem; font-size: .84rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--soft); }
td { padding: .25rem .6rem; border: 1px solid var(--line); border-radius: 4px; background: var(--card); }
td.right { background: var(--right); }
td.wrong, td.first { background: var(--wrong); font-weight: 600; }
td.first { outline: 3px solid var(--first); }
td.none { border-color: transparent; background: none; }
.finding { font-size: 1.1rem; max-width: 50rem; }
.soft { color: var(--soft); }
"""


def write_page(path: str, judgements: Sequence[Judgement]) -> None:
    """Write the page; it needs no other file. Raises OSError if it cannot be written."""
    Path(path).write_text(page(judgements))
    print(f"\n{path}", file=sys.stderr)


def page(judgements: Sequence[Judgement]) -> str:
    body = "".join(_strategy(judgement) for judgement in judgements)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return (
        f"<!doctype html><html lang=en><head>{head}<title>Where it goes wrong</title><style>{STYLE}</style></head>"
        "<body><h1>Where it goes wrong</h1><p class=soft>A module is green if every rank's part of its output "
        "(forward) and of the gradient of its output (backward) is one device's, as far as rounding allows. Read the "
        "first column down, then the second one up: the outlined box is the first that is wrong. A part of the update "
        "is below the two columns. A number is the largest error on any rank, relative to the largest right value; "
        "point at it to see what rounding explains.</p>"
        f"{body}</body></html>\n"
    )


def _strategy(judgement: Judgement) -> str:
    name = escape(judgement.plan.config.strategy.name)
    title = f"<h2>{name}: {escape(layout(judgement.plan))}, {judgement.plan.config.precision.value}</h2>"
    answer = judgement.answer.value
    search = judgement.place.search if judgement.place else None
    if search is None:
        problem = f"; not located: {judgement.place.problem}" if judgement.place else ""
        return f"{title}<p>{escape(answer + problem)}</p>"
    rows = "".join(_row(box, search.finding) for box in search.boxes)
    head = "<tr><th>module</th><th>forward ↓</th><th>backward ↑</th></tr>"
    below = _update(search.finding) if search.finding and search.finding.what == "update" else ""
    said = search.finding.sentence() if search.finding else f"{answer}; nothing wrong was found"
    return f"{title}<p class=finding>{escape(said[0].upper() + said[1:])}.</p><table>{head}{rows}</table>{below}"


def _row(box: Box, finding: Finding | None) -> str:
    sides = (("activation", box.forward), ("gradient", box.backward))
    first = (finding.what, finding.module) if finding and not finding.when else None  # boxes are of the first step
    cells = "".join(_cell(errors, first=first == (what, box.name)) for what, errors in sides)
    return f"<tr><th>{escape(box.name)}</th>{cells}</tr>"


def _cell(errors: tuple[float, float] | None, *, first: bool) -> str:
    if errors is None:
        return "<td class=none></td>"  # a module's inputs that are whole numbers have no gradient
    error, scale = errors
    kind = "first" if first else "right" if error <= scale else "wrong"
    return f'<td class={kind} title="rounding explains {scale:.0e}">{f"{error:.1e}" if error else "0"}</td>'


def _update(finding: Finding) -> str:
    of = f" of {finding.tensor}" if finding.tensor else ""
    cell = _cell((finding.error, finding.scale), first=True)
    return f"<table><tr><th>the update: {escape(finding.module + of)}</th>{cell}</tr></table>"
