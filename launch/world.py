"""A world of processes on this machine for a list of jobs: started once, watched, and ended whatever happens.

The ranks meet through a file, so no port is taken. A job that raises, dies or hangs gets an error as its result and
costs its world; the jobs after it run in a new one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which loads torch
    from train.prove import Job

REPO = Path(__file__).resolve().parent.parent
GRACE_S = 5.0  # between the first rank's bad end and the end of all: peers notice, and say so in their logs
POLL_S = 0.05
TAIL = 2000  # characters of each rank's log in an error


def run_world(
    folder: Path,
    jobs: Sequence[Job],
    *,
    size: int,
    runtime: Sequence[str] = (),
    timeout_s: float,
    worker: str = "train.prove",
) -> dict[str, dict[str, Any]]:
    """Results by job name: {"verdicts": …} or {"error": text}. The worker's module is run as `python -m worker`.

    `runtime`: overrides of the process group itself. `timeout_s`: the longest wait from one job's result to the next.
    """
    results: dict[str, dict[str, Any]] = {}
    remaining = list(jobs)
    while remaining:
        attempt = folder / f"world_{size}_{len(jobs) - len(remaining)}"
        attempt.mkdir(parents=True)
        task = {"jobs": [dataclasses.asdict(job) for job in remaining], "runtime": list(runtime)}
        (attempt / "jobs.json").write_text(json.dumps(task))
        end = _run(attempt, size, worker, timeout_s)
        found = _results(attempt)
        if end:  # the job that ended it is the one with an error, or the first without a result
            dead = next((job.name for job in remaining if "error" in found.get(job.name, {"error": ""})), "")
            said = found.get(dead, {}).get("error") or "\n".join(
                f"rank {i}: {_tail(attempt / f'rank_{i}.log')}" for i in range(size)
            )
            found[dead] = {"name": dead, "error": f"{end}\n{said}"}
        results |= found
        remaining = [job for job in remaining if job.name not in results]
    return results


def _run(folder: Path, size: int, worker: str, timeout_s: float) -> str:
    """Start the ranks and wait for them; how they ended, empty if well."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), *sys.path])}
    env.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // size, 1)))
    command = [sys.executable, "-X", "faulthandler", "-m", worker]
    results = folder / "results.jsonl"
    results.touch()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            with (folder / f"rank_{rank}.log").open("w") as log:
                argv = [*command, str(rank), str(size), str(folder)]
                ranks.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))
        return _watch(ranks, results, timeout_s)
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()


def _watch(ranks: list[subprocess.Popen[bytes]], results: Path, timeout_s: float) -> str:
    seen, deadline = 0, time.monotonic() + timeout_s
    while True:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return ""
        bad = next((rank for rank, code in enumerate(codes) if code), None)
        if bad is not None:
            grace = time.monotonic() + GRACE_S
            while time.monotonic() < grace and None in (process.poll() for process in ranks):
                time.sleep(POLL_S)
            code = codes[bad] or 0
            return f"rank {bad} " + (f"was ended by signal {-code}" if code < 0 else f"exited with code {code}")
        if (size := results.stat().st_size) != seen:
            seen, deadline = size, time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            return f"no result within {timeout_s:g} s (runtime.timeout_s): a rank hangs, or needs longer"
        time.sleep(POLL_S)


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for result in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        before = results.get(result["name"], {})
        results[result["name"]] = before if "error" in before else before | result  # the first error says why
    return results


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return text[-TAIL:] if text else "(no output)"
