"""The results of scripts/bench_strategies.sh, which calls this file.

python scripts/benching/results.py row FILE LABEL NPROC STATUS SECONDS DIR override …    add the results in DIR to FILE
python scripts/benching/results.py table FILE     the newest results of each point, as Markdown
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from scripts.benching.points import SCALED, Point
from train.command.process.streams import lasting
from train.measure.results import BY_RANK, LOSS, MEMORY, STATE_KINDS, Results, by_axis, memory_at_peak
from train.record.run_files import MOST_BYTES, Unreadable, clean, opened, read_records
from train.record.run_folder import read_config, read_facts, warmup_steps

SPEED = "perf/tokens_per_s_per_device"


def row(point: Point, status: str, seconds: float, folder: Path) -> dict[str, Any]:
    """The result of a point, from its folder: the file `log` and, if a run started, its directory in `runs`."""
    result: dict[str, Any] = {"label": point.label, "nproc": point.nproc, "status": status, "seconds": seconds}
    result["overrides"] = " ".join(point.overrides)
    with opened(folder / "log") as file:
        log = file.read(MOST_BYTES[".log"]).decode(errors="replace")
    if said := verdicts(log):
        result["verdicts"] = said
    if status.startswith("failed") and not said:
        result["why"] = why(log)
    for run in (folder / "runs").glob("*/metrics.jsonl"):
        try:
            result |= run_figures(run.parent)
        except Unreadable as error:
            result["why"] = f"{clean(run.parent.name)}: {error}"
    return result


def verdicts(log: str) -> dict[str, str]:
    """The verdict of scripts/verify.py for each strategy, from its log."""
    found, name = {}, ""
    for line in log.splitlines():
        if heading := re.match(r"(\w+) on \d+ process", line):
            name = heading[1]
        elif name and (line.startswith(("  equals", "  DIFFERS")) or "could not be run" in line):
            found[name] = line.strip()
    return found


def why(log: str) -> str:
    """The first line with an error or, without one, the lab's own message or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [
        line for pattern in ("Error: |out of memory", ": use |needs ") for line in lines if re.search(pattern, line)
    ]
    return next(iter([*named, *lines[-1:]]), "")[:300]


def run_figures(folder: Path) -> dict[str, Any]:
    """The figures of a run, also of a stopped one: medians of speeds over the measured steps, the largest values of
    memory after warm-up, and the last value of other tags. None of these without a measured step."""
    records, _ = read_records(folder / "metrics.jsonl")
    summary = read_facts(folder / "summary.json")
    results = Results.of((line for line in records if LOSS in line), warmup_steps(summary, read_config(folder)))
    facts = {name: summary[name] for name in ("commit", "torch", "device", "first_step_s") if name in summary}
    counts = {"steps": results.num_steps, "steps_measured": results.num_measured}
    result: dict[str, Any] = facts | {"run": folder.name, **counts}
    if results.num_measured:
        values = results.latest | results.settled
        speeds = {tag: results.median(tag) for tag in values if tag.startswith("perf/")}
        result |= {tag: value for tag, value in (values | speeds).items() if "/" in tag and not tag.startswith(BY_RANK)}
    return result


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of results, whose last line may be incomplete."""
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown tables of every point of which a step was measured, and of the scaling from 1 GPU; the others stand in a
    sentence. A dash means that a point has no such figure."""
    names = ("point", "GPUs", "tokens/s a GPU", "MFU, %", "tokens a joule", "peak, GiB", "of it, MiB",
             "sent a step, MiB", "exposed, ms", "bubble, %", "steps")  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    newest = {(r["label"], r["nproc"]): r for r in rows if not r["label"].startswith("verify")}
    empty = []
    for r in newest.values():
        if not (measured := r.get("steps_measured", 0)):
            empty.append(f"{r['label']} on {r['nproc']} ({r['status']})")
            continue
        cells = [
            r["label"], str(r["nproc"]), _shown(r, SPEED, ",.0f"), _shown(r, "perf/mfu_pct", ".1f"),
            _shown(r, "energy/tokens_per_joule", ".0f"), _shown(r, "memory/peak_allocated_gib", ".1f"), _memory(r),
            _by_axis(r, "mib"), _by_axis(r, "exposed_ms"), _shown(r, "pipeline/bubble_pct", ".1f"),
            f"{measured}" if r["status"] == "ok" else f"{measured} ({r['status']})",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    if empty:
        lines += ["", f"No step was measured of {', '.join(empty)}."]
    facts = {f"{r['device']}, torch {r['torch']}, commit {r['commit']}" for r in newest.values() if "device" in r}
    return "\n".join([*sorted(facts), "", *lines, "", *scaling(newest)])


def scaling(newest: dict[tuple[str, int], dict[str, Any]]) -> list[str]:
    """Tokens/s per GPU relative to `single`, where each GPU has the same share of the batch; lines of Markdown. Empty
    if `single` was not run."""
    speeds = {key: r[SPEED] for key, r in newest.items() if key[0] in SCALED and SPEED in r}
    one = newest.get(("single", 1), {}).get(SPEED)
    if not one or not speeds:
        return []
    sizes = sorted({nproc for _, nproc in speeds})
    lines = [f"| over `single`, % | {' | '.join(f'{n} GPU' for n in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for label in (label for label in SCALED if any((label, n) in speeds for n in sizes)):
        cells = [f"{100 * speeds[label, n] / one:.1f}" if (label, n) in speeds else "-" for n in sizes]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _shown(r: dict[str, Any], tag: str, spec: str) -> str:
    return format(r[tag], spec) if tag in r else ""


def _memory(r: dict[str, Any]) -> str:
    """Memory by kind: at the peak if a step was sampled, else the state between steps."""
    state = {kind: r[tag] for kind in STATE_KINDS if (tag := f"{MEMORY}{kind}_mib") in r}
    return "; ".join(f"{kind} {mib:,.0f}" for kind, mib in (memory_at_peak(r) or state).items())


def _by_axis(r: dict[str, Any], unit: str) -> str:
    """comm/<axis>/<op>_<unit>, summed over the operations of each axis: `tp 1,024; pp 64`."""
    return "; ".join(f"{axis} {value:,.0f}" for axis, value in by_axis(r, unit).items())


def main(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.command == "table":
        print(table(_lines(args.file)))
        return
    added = row(Point(args.label, args.nproc, tuple(args.overrides)), args.status, args.seconds, args.folder)
    with args.file.open("a") as out:
        out.write(json.dumps(added) + "\n")
    print(f"{args.label} on {args.nproc}: {args.status}, {args.seconds:g} s {added.get('why', '')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("scripts/benching/results.py", description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("row", help="add the results in a point's folder to a file")
    for name, kind in (("file", Path), ("label", str), ("nproc", int), ("status", str), ("seconds", float)):
        one.add_argument(name, type=kind)
    one.add_argument("folder", type=Path)
    one.add_argument("overrides", nargs="*")
    every = commands.add_parser("table", help="print the newest result of each point, as Markdown")
    every.add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    lasting()
    main(sys.argv[1:])
