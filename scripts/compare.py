"""Compare runs: python scripts/compare.py runs [--sort COLUMN] [--md|--csv|--json] [--html FILE] [--png DIR]

It takes run directories (finished, killed or still running) and folders of them. Runs of the same work are in one
table, which says whether their losses are equal. Other runs are in tables of their own, whose headings say what
differs. Compressed runs (scripts/compress.py) are in tables after those. A folder netlab-… of launch.netlab is shown by
the speed of its links, with what was predicted. The exit code is 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from scripts.comparing import table, words
from scripts.comparing.finding import Search
from scripts.comparing.gate import Group, groups_of
from scripts.comparing.links.show import is_netlab, show
from scripts.compressing import table as small
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.world import World
from train.record.run_files import clean, write_whole


def main() -> None:
    lasting()
    args = parser().parse_args()
    netlabs = [Path(path) for path in args.runs if is_netlab(Path(path))]
    if netlabs:
        with reported_once(World.single(), trains=False):
            for folder in netlabs:
                show(folder, args)
        return
    search = Search([Path(path) for path in args.runs])
    print("".join(f"compare: {line}\n" for line in search.notes), end="", file=sys.stderr)
    compressed, unread = small.read_all(search.compressed)
    print("".join(f"compare: {line}\n" for line in unread), end="", file=sys.stderr)
    if not search.runs and not compressed:
        where = ", ".join(clean(path) for path in args.runs)
        stop(f"no run in {where}: name a folder that contains metrics.jsonl, or a folder of such folders")
    groups, made = groups_of(search.runs), small.tables(compressed)
    if groups:
        groups[0].notes += [*search.points_without_run(), *search.notes]
    if groups and args.sort not in (names := table.sortable(groups)):
        stop(f"--sort {args.sort} is not a column: use one of {', '.join(names)}")
    table.sort(groups, args.sort)
    if args.html or args.png:
        draw(groups, made, args)
    if args.md or args.csv or args.json:
        tell(groups, made, args)
        return
    if groups:
        table.to_terminal(groups)
        print("\n" + "\n".join(words.verdicts(groups)))
    if made:
        small.to_terminal(made)


def tell(groups: list[Group], made: list[small.Table], args: argparse.Namespace) -> None:
    """Print the tables in the chosen format. CSV and JSON have one record for each run, and no compressed run."""
    if groups or args.json:
        write = table.to_markdown if args.md else table.to_csv if args.csv else table.to_json
        sys.stdout.write(write(groups))
    if made and args.md:
        sys.stdout.write("\n" * bool(groups) + small.to_markdown(made))
    elif made:
        print("compare: python scripts/compress.py --table --json shows compressed runs", file=sys.stderr)


def draw(groups: list[Group], made: list[small.Table], args: argparse.Namespace) -> None:
    """Write the pictures and the report, and print their paths to stderr."""
    try:
        from scripts.comparing.pages import compression, page, pictures
    except ModuleNotFoundError as error:
        stop(f"pictures need {error.name}, which is not installed: pip install 'strategy-lab[plot]'", code=3)
    try:
        if args.png:
            for path in pictures.save_all(groups, Path(args.png)):
                print(path, file=sys.stderr)
            for path in compression.save(made, Path(args.png) / "compression.png"):
                print(path, file=sys.stderr)
        if args.html:
            target, text = Path(args.html), page.report(groups, sys.argv[1:], made)
            if target.exists() and not target.is_file():  # for example /dev/stdout
                target.write_text(text, encoding="utf-8")
            else:
                write_whole(target.resolve(), text)
            print(args.html, file=sys.stderr)
    except OSError as error:
        stop(f"{args.html or args.png} cannot be written ({error.strerror}): name a path that can be written")


def parser() -> argparse.ArgumentParser:
    first, _, rest = (__doc__ or "").partition("\n")
    result = argparse.ArgumentParser(prog="scripts/compare.py", description=first, epilog=rest, allow_abbrev=False)
    result.add_argument("runs", nargs="+", help="run directories, or folders of them")
    sort_help = "sort by this figure of --json (default: tokens_per_s)"
    result.add_argument("--sort", default="tokens_per_s", metavar="COLUMN", help=sort_help)
    formats = result.add_mutually_exclusive_group()
    formats.add_argument("--md", action="store_true", help="print the table as Markdown")
    formats.add_argument("--csv", action="store_true", help="print every figure as CSV")
    formats.add_argument("--json", action="store_true", help="print every figure as JSON")
    result.add_argument("--html", metavar="FILE", help="write a report to one self-contained file")
    result.add_argument("--png", metavar="DIR", help="write the pictures to this folder")
    return result


def stop(message: str, code: int = 2) -> NoReturn:
    print(f"compare: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
