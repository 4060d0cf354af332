"""Print the largest micro batch that is said to fit: python -m scripts.scoring.largest_batch hardware=X OVERRIDE …

One process, and one microbatch a step.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count

from scripts.scoring.check_memory import says_fits
from train.command import cli
from train.command.planning.footprint import footprint
from train.command.planning.job import of_plan
from train.command.process.exits import reported_once
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="OVERRIDE", help="overrides of train/main.py, with a hardware file")
    with reported_once(World.single(), trains=False):
        print(largest_batch(parser.parse_args().words))


def largest_batch(words: Sequence[str]) -> int:
    """The rows of the largest micro batch that fits; 0 if none does. Raises BadInput if the device's memory is not
    known."""
    for rows in count(1):
        batch = [f"train.micro_batch_size={rows}", f"train.global_batch_size={rows}"]
        job = of_plan(Plan(cli.configured([*words, *batch]), 1))
        if (fits := says_fits(job, footprint(job))) is None:
            raise BadInput(Problem("hardware", "hardware.memory_gib is not known", "name a device: hardware=h100_sxm"))
        if not fits:
            break
    return rows - 1


if __name__ == "__main__":
    main()
