"""Measures an artefact in a process of its own: python -m scripts.exporting.alone FOLDER THREADS PROMPT TOKENS TRUST

It prints one line of JSON. Nothing that the artefact's runtime does not need is imported, so that the memory of the
process is that of the runtime, the model, Python and numpy.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from scripts.exporting.artefact import read
from scripts.exporting.rapl import Counters
from scripts.exporting.running.opened import may_run, run
from train.command.process.exits import reported_once
from train.config.world import World


@dataclass(frozen=True)
class Measured:
    """`load_ms`: from the file to a model that can be asked, with the import of its runtime. `peak_mib`: the most
    resident memory of the process. `first_token_ms`: from a prompt to the first token. `tokens_per_s`: of the tokens
    after it. `joules_per_token`: of all that runs on the processor; None without a counter."""

    load_ms: float
    peak_mib: float
    first_token_ms: float
    tokens_per_s: float
    joules_per_token: float | None


def measure(folder: Path, threads: int, prompt: int, tokens: int, trust: bool) -> Measured:
    artefact = read(folder)
    may_run(folder, artefact, trust)
    begin = time.perf_counter()
    runner = run(folder, artefact, threads)
    load_s = time.perf_counter() - begin
    ids = np.random.default_rng(0).integers(0, min(artefact.shape.vocab_size, 256), prompt)
    first_s, _ = runner.speed(ids, 1)  # the first call prepares kernels and memory, as a user feels it too
    counters = Counters()
    before = counters.read()
    begin = time.perf_counter()
    _, speed = runner.speed(ids, tokens)
    seconds = time.perf_counter() - begin
    joules = counters.joules(before, counters.read())
    share = tokens / speed / seconds  # of the time that was measured, the part in which tokens were generated
    each = None if joules is None else joules * share / tokens
    return Measured(1e3 * load_s, peak_mib(), 1e3 * first_s, speed, each)


def peak_mib() -> float:
    """Of this process since it began: Linux's own figure also counts the process that started it."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) / 2**10 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(argv: list[str]) -> None:
    folder, threads, prompt, tokens, trust = argv
    with reported_once(World.single(), trains=False):
        found = measure(Path(folder), int(threads), int(prompt), int(tokens), trust == "true")
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
