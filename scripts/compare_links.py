"""Show what launch.netlab predicted and measured: python scripts/compare_links.py FOLDER [--md] [--html FILE] [--png
FILE]

FOLDER is the netlab-… folder that launch.netlab names. It prints a table of the runs at each speed of the links, one of
the messages beside what the links can carry at most, and sentences: which pairs of runs are in the predicted order, and
where two strategies are equally fast. --html writes a page with the picture, --png the picture alone. The exit code is
2 if there is nothing to show.
"""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from pathlib import Path

from scripts.comparing.links import words
from scripts.comparing.links.reading import read
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.command.resources import words_of
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World
from train.record.run_files import Unreadable, write_whole


def main(argv: list[str]) -> None:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(prog="scripts/compare_links.py", description=first, epilog=rest)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--md", action="store_true", help="print the tables as Markdown")
    parser.add_argument("--html", metavar="FILE", help="write a page to one self-contained file")
    parser.add_argument("--png", metavar="FILE", help="write the picture to this file")
    args = parser.parse_args(argv)
    with reported_once(World.single(), trains=False):
        try:
            results = read(args.folder)
        except Unreadable as error:
            raise BadInput(Problem("results", str(error), "name the netlab-… folder of launch.netlab")) from error
        if (args.html or args.png) and importlib.util.find_spec("matplotlib") is None:
            fix = 'pip install "strategy-lab[plot]"'
            raise BadInput(Problem("plot", "a picture needs matplotlib", fix, exit_code=EXIT_ENVIRONMENT))
        parts = [words.table(results, markdown=args.md), [*words.summary(results)],
                 words.messages(results, markdown=args.md)]  # fmt: skip
        print("\n\n".join("\n".join(lines) for lines in parts if lines))
        if args.html or args.png:
            from scripts.comparing.links import page

            command = shlex.join(["python", *words_of("scripts/compare_links.py"), *argv])
            if args.html:
                write_whole(Path(args.html).resolve(), page.report(results, command))
            if args.png and results.rows:
                page.save(results, Path(args.png))


if __name__ == "__main__":
    lasting()
    main(sys.argv[1:])
