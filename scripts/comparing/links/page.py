"""The picture and the page of launch.netlab's results: throughput against the speed of the links."""

from __future__ import annotations

from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scripts.comparing.links import words
from scripts.comparing.links.reading import Results, crossings
from scripts.comparing.pages.page import facts_list, svg
from scripts.comparing.pages.scripts import STYLES, policy
from scripts.comparing.pages.style import LINES, STYLE, Picture
from train.record.palette import strategy_colours

SIZE_IN = (7.0, 4.6)
TITLE = "Steps per second by the speed of the links between hosts"
NOTE = "Lines: measured, medians. Rings: predicted before the runs. Crosses: where two strategies are equally fast."


def picture(results: Results) -> Picture:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE_IN, layout="constrained")
        axes = figure.subplots()
        labels = list(dict.fromkeys(row.label for row in results.rows))
        strategies = {row.label: row.strategy for row in results.rows}
        colours = strategy_colours([*strategies.values()])
        seen: dict[str, int] = {}
        for label in labels:
            rows = sorted((row for row in results.rows if row.label == label), key=lambda row: row.inter or 1e18)
            dash = LINES[seen.setdefault(strategies[label], 0) % len(LINES)]
            seen[strategies[label]] += 1
            speeds = [(row.inter or results.unshaped) / 1e6 for row in rows]
            measured = [(x, 1e3 / row.measured_ms) for x, row in zip(speeds, rows, strict=True) if row.measured_ms]
            colour = colours[strategies[label]]
            axes.plot(
                *zip(*measured, strict=True) if measured else ([], []), dash, color=colour, marker=".", label=label
            )
            predicted = [1e3 / row.predicted_ms for row in rows]
            axes.plot(speeds, predicted, "o", color=colour, markerfacecolor="none", markersize=9, linestyle="")
        for one in crossings(results):
            if not one.predicted:
                axes.plot(one.speed / 1e6, 1e3 / one.ms, "x", color="black", markersize=8)
                axes.annotate(f"{one.speed / 1e6:,.0f}", (one.speed / 1e6, 1e3 / one.ms), (6, -3),
                              textcoords="offset points", fontsize=8)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        marks = sorted({(speed or results.unshaped) / 1e6 for speed in results.speeds})
        axes.set_xticks(marks, [f"{mark:,.4g}" for mark in marks])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.set_xlabel("Mbit/s of each host's link")
        axes.set_ylabel("steps/s")
        axes.grid(color="0.5", alpha=0.25)
        axes.legend(fontsize=8.5)
    return Picture("links", TITLE, figure, NOTE)


def save(results: Results, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        picture(results).figure.savefig(path, dpi=160)


def report(results: Results, command: str) -> str:
    """The whole page, which needs no other file and no script."""
    shown = picture(results) if results.rows else None
    facts = {
        "hosts": f"{results.hosts}, with {results.processes} processes",
        "unshaped": f"{results.unshaped / 1e6:,.0f} Mbit/s by an all-reduce of 4 MiB",
        **results.environment,
        "command": f"python -m launch.netlab {results.line}",
        "this page": command,
    }
    figure = ""
    if shown:
        caption = f"<figcaption>{escape(shown.title)}<small>{escape(shown.note)}</small></figcaption>"
        figure = f'<figure class="wide">{caption}<div class="scroll" tabindex="0">{svg(shown, "links")}</div></figure>'
    sentences = "".join(f"<li>{escape(line)}</li>" for line in [*words.summary(results), *words.NOTES])
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy([])}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>Strategy Lab: {TITLE}</title>\n<style>\n{STYLES}</style></head>\n<body>",
            f"<header><p>Strategy Lab</p><h1>{TITLE}</h1>\n{facts_list(facts)}</header>\n<main>",
            f'<section><h2>Runs</h2>{figure}<ul class="notes">{sentences}</ul>{_table(words.cells(results))}</section>',
            f"<section><h2>Messages</h2>{_table(words.message_cells(results))}</section>",
            "</main></body></html>\n",
        ]
    )


def _table(rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    table = f"<table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'
