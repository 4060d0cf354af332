"""The report: one HTML file that holds everything, opens offline, on a phone, and in the dark."""

from __future__ import annotations

import io
import re
import time
from html import escape
from pathlib import Path
from typing import Any

import matplotlib

from . import words
from .gate import Group, Row
from .pictures import pictures_of
from .runs import Run, config_differences
from .style import STYLE, Picture
from .table import METHOD, Column, best, columns_of, notes_of

ENVIRONMENT = ("commit", "torch", "python", "device", "platform", "backend", "world_size", "omp_threads")
CSS = (Path(__file__).parent / "page.css").read_text()


def report(groups: list[Group]) -> str:
    """The whole page."""
    runs = [row.run for group in groups for row in group.rows]
    sections = [_section(group, pictures, i) for i, (group, pictures) in
                enumerate(zip(groups, pictures_of(groups), strict=True))]  # fmt: skip
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Strategy Lab: {title}</title>\n<style>\n{CSS}</style></head>\n<body>",
            f"<header><p>Strategy Lab</p><h1>{title}</h1></header>\n<main>",
            *sections,
            "<section><h2>Environment</h2>",
            _environment(runs),
            "</section>\n<section><h2>Configs: what is not the same</h2>",
            _configs(runs),
            "</section>\n</main>",
            f"<footer>{escape(METHOD)}</footer>",
            "</body></html>\n",
        ]
    )


def _section(group: Group, pictures: list[Picture], index: int) -> str:
    sentences = " ".join(words.summary(group))
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(group))
    figures = "\n".join(_figure(picture, f"g{index}-{picture.name}") for picture in pictures)
    return (
        f'<section><h2>{escape(group.heading)}</h2>\n<p class="summary">{escape(sentences)}</p>\n{_table(group)}'
        f'\n<ul class="notes">{notes}</ul>\n<div class="pictures">\n{figures}\n</div></section>'
    )


def _table(group: Group) -> str:
    columns = columns_of(group)
    winners = {column.title: best(group, column.key) for column in columns if column.rated}
    head = "".join(f'<th scope="col"{_align(column)}>{escape(column.title)}</th>' for column in columns)
    rows = "\n".join(f"<tr>{''.join(_cell(row, column, winners) for column in columns)}</tr>" for row in group.rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _align(column: Column) -> str:
    return ' class="number"' if column.key else ""


def _cell(row: Row, column: Column, winners: dict[str, Row | None]) -> str:
    text = escape(column.text(row))
    if column.title == "strategy":
        status = "" if row.run.status == "finished" else f"<small>{escape(row.run.status)}</small>"
        return f'<th scope="row">{text}{status}</th>'
    if column.title == "equal" and not row.good:
        return f'<td class="bad">{text}</td>'
    if winners.get(column.title) is row:
        return f'<td class="number best">{text}</td>'
    return f"<td{_align(column)}>{text}</td>"


def _figure(picture: Picture, prefix: str) -> str:
    classes = "wide" if picture.wide else ""
    note = f"<small>{escape(picture.note)}</small>" if picture.note else ""
    caption = f"<figcaption>{escape(picture.title)}{note}</figcaption>"
    return f'<figure class="{classes}">{caption}<div class="scroll">{svg(picture, prefix)}</div></figure>'


def svg(picture: Picture, prefix: str) -> str:
    """The picture as inline SVG: transparent, black as the text's colour, ids of its own, no address of anything."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        picture.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)  # HTML knows what an svg is
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = text.replace("xlink:href=", "href=").replace("#000000", "currentColor")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    label = escape(picture.title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _environment(runs: list[Run]) -> str:
    """One line for what is the same everywhere, a column for each run where it is not."""
    facts: dict[str, list[Any]] = {name: [run.facts.get(name) for run in runs] for name in ENVIRONMENT}
    facts["started (UTC)"] = [_date(run) for run in runs]
    facts["state"] = [run.status for run in runs]
    return _matrix({name: values for name, values in facts.items() if any(v is not None for v in values)}, runs)


def _date(run: Run) -> str | None:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.steps[0]["time"])) if run.steps else None


def _configs(runs: list[Run]) -> str:
    return _matrix(config_differences(runs), runs) if len(runs) > 1 else "<p>One run, nothing to hold it against.</p>"


def _matrix(facts: dict[str, list[Any]], runs: list[Run]) -> str:
    same = {name: values[0] for name, values in facts.items() if all(value == values[0] for value in values)}
    lines = [f"<dt>{escape(name)}</dt><dd>{_shown(value)}</dd>" for name, value in same.items()]
    common = f"<dl>{''.join(lines)}</dl>" if lines else ""
    if len(same) == len(facts):
        return common or "<p>Nothing.</p>"
    works = {run.facts.get("work_hash") for run in runs}
    names = [f"{run.label} ({run.facts.get('work_hash')})" if len(works) > 1 else run.label for run in runs]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_shown(value)}</td>" for value in values)}</tr>'
        for name, values in facts.items()
        if name not in same
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f'{common}<div class="scroll">{table}</div>'


def _shown(value: Any) -> str:
    return "-" if value is None or value == "" else escape(str(value))
