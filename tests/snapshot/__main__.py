"""Check that a restructure changed nothing: what runs compute and send, and the answers to bad command lines.

    python -m tests.snapshot record FOLDER            on the code before, and on the code after, on one machine
    python -m tests.snapshot record FOLDER --only runs      or refusals; what FOLDER has already is not recorded again
    python -m tests.snapshot compare BEFORE AFTER     lists every difference; exit code 1 if there is one

It uses only the commands (launch.local, launch.explain, launch.sweep, train/main.py), whose names stay, and imports
nothing of the product by a path that may move.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tests.snapshot import messages, refusals, runs

REFUSALS = "refusals.jsonl"


def record(folder: Path, only: str | None) -> bool:
    """Whether everything that was requested is recorded."""
    folder.mkdir(parents=True, exist_ok=True)
    complete = True
    if only != "runs":
        began = time.monotonic()
        found = refusals.record(folder / REFUSALS)
        crashed = [line for line, one in found.items() if one["code"] not in (0, 2, 3)]
        failing = [f"{line}: {offer}" for line, one in found.items() for offer, code in one["offers"].items() if code]
        print(*(f"neither valid nor refused: {line}" for line in crashed), sep="\n")
        print(*(f"an offer that does not work: {text}" for text in failing), sep="\n")
        refused = sum(one["code"] != 0 for one in found.values())
        offered = sum(len(one["offers"]) for one in found.values())
        print(f"{len(found)} lines, {refused} refused; {offered} fixes offered, {offered - len(failing)} validate; "
              f"{time.monotonic() - began:.0f} s")  # fmt: skip
    if only != "refusals":
        complete = runs.record(folder / "runs")
    return complete


def compare(before: Path, after: Path) -> bool:
    """Whether the two records say the same."""
    differences = runs.compare(before / "runs", after / "runs")
    print(*differences, sep="\n")
    old, new = (refusals.read(folder / REFUSALS) for folder in (before, after))
    outcome = messages.compare(old, new)
    messages.show(outcome, len(old))
    return not differences and not outcome.differences


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.snapshot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("folder", type=Path)
    recording.add_argument("--only", choices=["runs", "refusals"])
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "record":
        return 0 if record(args.folder.absolute(), args.only) else 1
    return 0 if compare(args.before, args.after) else 1


if __name__ == "__main__":
    raise SystemExit(main())
