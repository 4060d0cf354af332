"""Measure exported models, each in a fresh process, in turns: python scripts/edge_bench.py ARTEFACT … [key=value …]

    python scripts/edge_bench.py runs/NAME/exports/*              everything that was exported of a run
    python scripts/edge_bench.py A B threads=1,2 rounds=5         two of them, five times each on 1 and on 2 threads

    threads=1,2    how many threads the runtime has
    prompt=32      tokens of the prompt, drawn at random
    tokens=64      that are generated, each the most likely one
    rounds=3       how often each is measured; the median is shown
    trust=true     load native code (to=aoti) too: it can do anything on this machine

ARTEFACT is a folder that scripts/export.py has written. The table has bytes on the disk, the time to load with the
import of the runtime, the most resident memory of the process, the time to the first token, the tokens/s after it, and
joules for each token where the processor has a counter (RAPL). Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.exporting.alone import Measured
from scripts.exporting.artefact import Artefact, read
from scripts.exporting.rapl import Counters
from scripts.exporting.running.opened import may_run
from train.command.option import TRUE_OR_FALSE, Option, positive
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.command.resources import ROOT
from train.config import plain_json
from train.config.fields import MAX_TOKENS
from train.config.problems import BadInput, Problem, Reported
from train.config.world import World

TOOL = "scripts/edge_bench.py"
MiB = 2**20
MOST_THREADS, MOST_ROUNDS, MOST_S = 256, 1_000, 3_600


def _several(text: str) -> tuple[int, ...] | None:
    read_one = positive(MOST_THREADS)[1]
    found = [read_one(part) for part in text.split(",")]
    return tuple(one for one in found if one) if all(found) else None


THREADS: Option[tuple[int, ...]] = Option(
    "threads", (1, 2), (TOOL,), f"positive integers, at most {MOST_THREADS}", _several, example="1,2", help=""
)
PROMPT: Option[int] = Option("prompt", 32, (TOOL,), *positive(MAX_TOKENS), example="32", help="")
TOKENS: Option[int] = Option("tokens", 64, (TOOL,), *positive(MAX_TOKENS), example="64", help="")
ROUNDS: Option[int] = Option("rounds", 3, (TOOL,), *positive(MOST_ROUNDS), example="5", help="")
TRUST: Option[bool] = Option("trust", False, (TOOL,), *TRUE_OR_FALSE, example="true", help="")
OPTIONS: tuple[Option[Any], ...] = (THREADS, PROMPT, TOKENS, ROUNDS, TRUST)


class Failed(Reported):
    """A process that measures has failed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


@dataclass(frozen=True)
class Job:
    """An artefact on so many threads."""

    folder: Path
    artefact: Artefact
    threads: int

    def measure(self, prompt: int, tokens: int, trust: bool) -> Measured:
        words = [str(self.folder), str(self.threads), str(prompt), str(tokens), str(trust).lower()]
        command = [sys.executable, "-m", "scripts.exporting.alone", *words]
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": paths}
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=MOST_S, check=False)
        if run.returncode:
            said = [line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"]
            raise Failed(f"{self.folder} on {self.threads} thread(s) was not measured: {said[-1]}", run.returncode)
        return Measured(**json.loads(run.stdout.splitlines()[-1]))


def main(argv: list[str]) -> int:
    leave_on_interrupt()
    parser = argparse.ArgumentParser(
        prog=TOOL, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("words", nargs="+", metavar="ARTEFACT")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    args = parser.parse_intermixed_args(argv)
    with reported_once(World.single(), trains=False):
        words = [*args.words]
        threads, prompt, tokens, rounds, trust = (option.pop(words) for option in OPTIONS)
        jobs = jobs_of([Path(word) for word in words], threads, prompt + tokens, trust)
        found = [[job.measure(prompt, tokens, trust) for job in jobs] for _ in range(rounds)]
        rows = [row(job, [*measured]) for job, measured in zip(jobs, zip(*found, strict=True), strict=True)]
        print("\n".join(map(plain_json.dumps, rows)) if args.json else table(rows))
        if not Counters().packages:
            print("no joules: this machine shows no energy counter of its processor (RAPL)", file=sys.stderr)
    return 0


def jobs_of(folders: list[Path], threads: tuple[int, ...], length: int, trust: bool) -> list[Job]:
    """What is measured, in the order of a round. Raises BadInput for a folder that is no artefact or may not run."""
    if not folders:
        raise BadInput(Problem("artefact", "no artefact is given", "name folders that scripts/export.py has written"))
    artefacts = [(folder, read(folder)) for folder in folders]
    for folder, artefact in artefacts:
        may_run(folder, artefact, trust)
        if length >= (most := artefact.shape.max_seq_len):
            message = f"{length} tokens with the prompt do not fit into the {most} positions of {folder}"
            raise BadInput(Problem("tokens", message, f"use prompt= and tokens= with a sum below {most}"))
    return [Job(folder, artefact, number) for number in threads for folder, artefact in artefacts]


def row(job: Job, rounds: list[Measured]) -> dict[str, Any]:
    """The medians of the rounds."""
    names = ("load_ms", "peak_mib", "first_token_ms", "tokens_per_s")
    medians = {name: statistics.median(getattr(one, name) for one in rounds) for name in names}
    joules = [one.joules_per_token for one in rounds if one.joules_per_token is not None]
    return {
        "artefact": str(job.folder),
        "threads": job.threads,
        "bytes": job.artefact.bytes,
        **medians,
        "joules_per_token": statistics.median(joules) if joules else None,
        "rounds": len(rounds),
    }


def table(rows: list[dict[str, Any]]) -> str:
    head = ("artefact", "threads", "MiB", "load, ms", "peak, MiB", "first token, ms", "tokens/s", "J/token")
    cells = [
        (
            one["artefact"],
            str(one["threads"]),
            f"{one['bytes'] / MiB:,.2f}",
            f"{one['load_ms']:,.0f}",
            f"{one['peak_mib']:,.0f}",
            f"{one['first_token_ms']:,.1f}",
            f"{one['tokens_per_s']:,.1f}",
            "-" if one["joules_per_token"] is None else f"{one['joules_per_token']:.4f}",
        )
        for one in rows
    ]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in (head, *cells))
    )


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
