"""The report: one self-contained HTML file, which can be read offline, on a phone, and in dark mode."""

from __future__ import annotations

import io
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib

from scripts.comparing import words
from scripts.comparing.configs import differences
from scripts.comparing.gate import Group, Row
from scripts.comparing.pages import compression, head
from scripts.comparing.pages.pictures import pictures_of
from scripts.comparing.pages.scripts import STYLES, data, policy, scripts
from scripts.comparing.pages.style import NOT_DRAWN_WELL, STYLE, TIP, Colours, Picture
from scripts.comparing.runs import Run
from scripts.comparing.table import METHOD, Column, best, columns_of, notes_of
from scripts.compressing.table import Table
from train.record.run_files import clean

ENVIRONMENT = ("commit", "torch", "python", "device", "platform", "backend", "world_size", "omp_threads", "command")
TITLE_IN, PANEL_IN = 1.1, 2.4  # the approximate heights of a title with its note, and of a chart with its legend


def report(groups: list[Group], argv: list[str], compressed: Sequence[Table] = ()) -> str:
    """The whole page. `argv`: the arguments of the command that makes it. `compressed`: the tables of compressed
    runs."""
    runs = [row.run for group in groups for row in group.rows]
    colours = Colours(groups)
    sections = [_section(group, pictures, i, colours) for i, (group, pictures) in
                enumerate(zip(groups, pictures_of(groups), strict=True))]  # fmt: skip
    sections += compression.sections(compressed, _figure)
    title = f"{len(runs)} run{'s' if len(runs) > 1 else ''} compared" if runs else "Compressed runs"
    parts = scripts()
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy(parts)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Strategy Lab: {title}</title>\n<style>\n{STYLES}</style></head>\n<body>",
            f"<header><p>Strategy Lab</p><h1>{title}</h1>\n{facts_list(head.facts(groups, argv))}</header>\n<main>",
            *sections,
            *([f"<section><h2>Environment</h2>\n{_environment(runs)}\n</section>"] if runs else []),
            *([f"<section><h2>Configs: what is not the same</h2>\n{_configs(runs)}\n</section>"] if runs else []),
            "</main>",
            f"<footer>{escape(METHOD)}</footer>",
            *(f"<script>{part}</script>" for part in parts),
            "</body></html>\n",
        ]
    )


def _section(group: Group, pictures: list[Picture], index: int, colours: Colours) -> str:
    sentences = " ".join(filter(None, [head.verdict(group), *words.summary(group)]))
    notes = "".join(f"<li>{escape(note)}</li>" for note in notes_of(group))
    return (
        f'<section><h2>{escape(group.heading)}</h2>\n<p class="summary">{escape(sentences)}</p>\n'
        f'{_table(group, colours)}\n<ul class="notes">{notes}</ul>\n{_arranged(pictures, index)}</section>'
    )


def _arranged(pictures: list[Picture], index: int) -> str:
    """Two columns of about the same length: each picture is added to the shorter one. Wide pictures are below them."""
    columns: tuple[list[str], list[str]] = ([], [])
    heights = [0.0, 0.0]
    for picture in (picture for picture in pictures if not picture.wide):
        place = heights.index(min(heights))
        columns[place].append(_figure(picture, f"g{index}-{picture.name}"))
        drawn = len(picture.panels) * PANEL_IN or float(picture.figure.get_size_inches()[1])
        heights[place] += drawn + TITLE_IN
    wide = "\n".join(_figure(picture, f"g{index}-{picture.name}") for picture in pictures if picture.wide)
    sides = "\n".join(f'<div class="column">{"".join(column)}</div>' for column in columns if column)
    return f'<div class="pictures">\n{sides}</div>\n{wide}'


def _table(group: Group, colours: Colours) -> str:
    columns = columns_of(group)
    winners = {column.title: best(group, column.key) for column in columns if column.rated}
    titles = "".join(f'<th scope="col"{_align(column)}>{escape(column.title)}</th>' for column in columns)
    rows = "\n".join(
        f"<tr>{''.join(_cell(row, column, winners, colours) for column in columns)}</tr>" for row in group.rows
    )
    table = f'<table class="sortable n-last"><thead><tr>{titles}</tr></thead>\n<tbody>\n{rows}\n</tbody></table>'
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _align(column: Column) -> str:
    return ' class="number"' if column.key else ""


def _cell(row: Row, column: Column, winners: dict[str, Row | None], colours: Colours) -> str:
    text = escape(column.text(row))
    if column.title == "strategy":
        status = "" if row.run.status == "finished" else f"<small>{escape(row.run.status)}</small>"
        square = f'<rect width="1" height="1" fill="{colours.colour(row)}"/>'
        swatch = f'<svg class="swatch" viewBox="0 0 1 1" aria-hidden="true">{square}</svg>'
        return f'<th scope="row" data-sort="{text}">{swatch}{text}{status}</th>'
    if column.title == "equal" and not row.good:
        return f'<td class="bad">{text}</td>'
    if not column.key:
        return f"<td>{text}</td>"
    value = row.figures[column.key]
    kind = "number best" if winners.get(column.title) is row else "number"
    return f'<td class="{kind}" data-sort="{"" if value is None else repr(value)}">{text}</td>'


def _figure(picture: Picture, prefix: str) -> str:
    classes = " ".join(["wide"] * picture.wide + ["interactive"] * bool(picture.panels))
    note = f"<small>{escape(picture.note)}</small>" if picture.note else ""
    caption = f"<figcaption>{escape(picture.title)}{note}</figcaption>"
    chart = f'<div class="chart"></div>{data(picture)}' if picture.panels else ""
    drawn = f'<div class="scroll" tabindex="0">{svg(picture, prefix)}</div>'
    return f'<figure class="{classes}" id="{prefix}">{caption}{drawn}{chart}</figure>'


def svg(picture: Picture, prefix: str) -> str:
    """The picture as inline SVG: transparent, with black replaced by the colour of the text, with unique ids, and
    without links to other files."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", NOT_DRAWN_WELL)
        picture.figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", text)  # not needed inside HTML
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = text.replace("xlink:href=", "href=").replace("#000000", "currentColor")
    text = re.sub(rf'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", text)  # browsers show it as a tooltip
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", text)
    label = escape(picture.title, quote=True)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _environment(runs: list[Run]) -> str:
    """One line for each fact that all runs share, and a table with a column for each run for the other facts."""
    facts: dict[str, list[Any]] = {name: [run.facts.get(name) for run in runs] for name in ENVIRONMENT}
    facts["started (UTC)"] = [_date(run) for run in runs]
    facts["folder"] = [clean(run.path) for run in runs]
    facts["state"] = [run.status for run in runs]
    return _matrix({name: values for name, values in facts.items() if any(v is not None for v in values)}, runs)


def _date(run: Run) -> str | None:
    started = run.steps[0].get("time") if run.steps else None
    return None if started is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(started))


def _configs(runs: list[Run]) -> str:
    if len(runs) < 2:
        return "<p>There is only one run, so there is nothing to compare.</p>"
    note = "<p>A dash: the strategy does not have the key, or does not use it.</p>"
    return note + _matrix(differences([run.config for run in runs]), runs)


def _matrix(facts: dict[str, list[Any]], runs: list[Run]) -> str:
    same = {name: values[0] for name, values in facts.items() if all(value == values[0] for value in values)}
    common = facts_list(same) if same else ""
    if len(same) == len(facts):
        return common or "<p>No difference.</p>"
    works = {run.work_hash for run in runs}
    names = [f"{run.label} ({run.work_hash})" if len(works) > 1 else run.label for run in runs]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{_shown(value)}</td>" for value in values)}</tr>'
        for name, values in facts.items()
        if name not in same
    )
    table = f"<table><thead><tr><td></td>{head}</tr></thead>\n<tbody>{rows}</tbody></table>"
    return f'{common}<div class="scroll" tabindex="0">{table}</div>'


def facts_list(facts: Mapping[str, Any]) -> str:
    lines = [f"<dt>{escape(name)}</dt><dd>{_shown(value)}</dd>" for name, value in facts.items()]
    return f"<dl>{''.join(lines)}</dl>"


def _shown(value: Any) -> str:
    return "-" if value is None or value == "" else escape(clean(value, 300))
