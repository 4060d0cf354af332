"""Show what launch.netlab predicted and measured, for scripts/compare.py."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from launch.emulating.cluster import RESULTS
from scripts.comparing.links import words
from scripts.comparing.links.reading import read
from train.command.resources import words_of
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.record.run_files import Unreadable, exists, write_whole

PICTURE = "links.png"  # in the folder of --png


def is_netlab(path: Path) -> bool:
    """Whether it is a folder of launch.netlab."""
    return exists(path / RESULTS)


def show(folder: Path, args: argparse.Namespace) -> None:
    """Print a table of the runs at each speed, one of the messages beside what the links can carry at most, and what
    follows from them. Raises BadInput for what cannot be read or drawn."""
    if args.csv or args.json:
        message = f"{folder} is of launch.netlab, whose figures are in its {RESULTS}"
        raise BadInput(Problem("format", message, "leave --csv and --json out"))
    try:
        results = read(folder)
    except Unreadable as error:
        raise BadInput(Problem("results", str(error), "run launch.netlab again")) from error
    if (args.html or args.png) and importlib.util.find_spec("matplotlib") is None:
        fix = 'pip install "strategy-lab[plot]"'
        raise BadInput(Problem("plot", "a picture needs matplotlib", fix, exit_code=EXIT_ENVIRONMENT))
    parts = [
        words.table(results, markdown=args.md),
        [*words.summary(results)],
        words.messages(results, markdown=args.md),
    ]
    print("\n\n".join("\n".join(lines) for lines in parts if lines))
    if args.html or args.png:
        from scripts.comparing.links import page

        command = shlex.join(["python", *words_of("scripts/compare.py"), *sys.argv[1:]])
        if args.html:
            write_whole(Path(args.html).resolve(), page.report(results, command))
        if args.png and results.rows:
            Path(args.png).mkdir(parents=True, exist_ok=True)
            page.save(results, Path(args.png) / PICTURE)
