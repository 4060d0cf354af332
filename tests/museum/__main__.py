"""Run the museum: python -m tests.museum [bug …] [--write]

It runs the exhibits that have no result in build/museum.jsonl yet, or those that are named, and prints what the proof
says about each. `--write` runs nothing, and writes docs/museum.md from the results.
"""

import argparse
import sys

from tests.museum import words
from tests.museum.exhibits import EXHIBITS
from tests.museum.running import ROOT, read, run
from tests.museum.writing import page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.museum", description=__doc__)
    parser.add_argument("bugs", nargs="*", help="the names of the bugs to run, also if they have a result")
    parser.add_argument("--write", action="store_true", help="write docs/museum.md from the results")
    arguments = parser.parse_args()
    if unknown := set(arguments.bugs) - {exhibit.bug for exhibit in EXHIBITS}:
        parser.error(f"no exhibit has the bug {min(unknown)}; tests/museum/exhibits has their names")
    done = read(EXHIBITS)
    if arguments.write:
        (ROOT / "docs" / "museum.md").write_text(page(EXHIBITS, done))
        return 0
    finished = {bug for bug, outcome in done.items() if not outcome.problem}
    wanted = [e for e in EXHIBITS if (e.bug in arguments.bugs if arguments.bugs else e.bug not in finished)]
    for outcome in run(wanted):
        print(words.lines(outcome), flush=True)
    outcomes = read(EXHIBITS)
    print(words.score(outcomes.values(), len(EXHIBITS)))
    return 0 if all(e.bug in outcomes and outcomes[e.bug].caught for e in EXHIBITS) else 1


if __name__ == "__main__":
    sys.exit(main())
