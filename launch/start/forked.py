"""A world of processes on this machine for a list of jobs: started once, watched, and ended whatever happens.

The ranks meet through a file, so no port is taken. A job that raises, dies or hangs gets an error as its result and
costs its world; the jobs after it run in a new one. Jobs run sorted by layout, so that those of one share a mesh.

A rank is forked from a server (`multiprocessing`'s forkserver) that has imported the worker and torch already, so that
starting a world costs a fork per rank. The server never touches a device: ranks may use a GPU.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.start.environment import own_code, threads
from train.command.process.parent import die_with
from train.config.schema import RuntimeConfig
from train.config.strategy import resolve_degrees

if TYPE_CHECKING:  # which loads torch
    from train.proof.jobs import Job

GRACE_S = 5.0  # between the first rank's bad end and the end of all: peers notice, and say so in their logs
POLL_S = 0.05
TAIL = 2000  # characters of each rank's log in an error


def run_world(
    folder: Path,
    jobs: Sequence[Job],
    *,
    size: int,
    runtime: RuntimeConfig | None = None,
    timeout_s: float,
    worker: str = "train.proof.jobs",
) -> dict[str, dict[str, Any]]:
    """Results by job name: {"verdicts": …} or {"error": text}.

    `worker`: the module whose `run(job, site)` each rank calls. `runtime`: of the process group itself.
    `timeout_s`: the longest wait from one job's result to the next.
    """
    results: dict[str, dict[str, Any]] = {}
    remaining = sorted(jobs, key=lambda job: [*resolve_degrees(job.config.strategy.mesh_axes(), size).values()])
    while remaining:
        attempt = folder / f"world_{size}_{len(jobs) - len(remaining)}"
        attempt.mkdir(parents=True)
        end = _run(attempt, remaining, size, runtime or RuntimeConfig(), worker, timeout_s)
        found = _results(attempt)
        if end:  # by the job with an error, or the first without a result; all have one if the ranks ended badly after
            last = remaining[-1].name
            dead = next((job.name for job in remaining if "error" in found.get(job.name, {"error": ""})), last)
            said = found.get(dead, {}).get("error") or "\n".join(
                f"rank {i}: {_tail(attempt / f'rank_{i}.log')}" for i in range(size)
            )
            found[dead] = {"name": dead, "error": f"{end}\n{said}"}
        results |= found
        remaining = [job for job in remaining if job.name not in results]
    return results


def _run(folder: Path, jobs: list[Job], size: int, runtime: RuntimeConfig, worker: str, timeout_s: float) -> str:
    """Start the ranks and wait for them; how they ended, empty if well."""
    context = multiprocessing.get_context("forkserver")
    # of the first world of this process (later ones find the server running); and what most strategies import
    context.set_forkserver_preload(["train.proof.jobs", "train.strategies.pipeline.stages", worker])
    results = folder / "results.jsonl"
    for file in (results, *(folder / f"rank_{rank}.log" for rank in range(size))):
        file.touch()
    ranks = [context.Process(target=_rank, args=(rank, size, folder, jobs, runtime, worker)) for rank in range(size)]
    try:
        with own_code():  # of the server too, which is started with the first rank
            for process in ranks:
                process.start()
        return _watch(ranks, results, timeout_s)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(rank: int, size: int, folder: Path, jobs: list[Job], runtime: RuntimeConfig, worker: str) -> None:
    """What a forked process does: it ends with the server, which ends with whoever started the world; its output goes
    to its log; and `jobs.run_jobs` does the rest."""
    die_with(os.getppid())
    with (folder / f"rank_{rank}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    faulthandler.enable()
    import torch

    from train.proof.jobs import run_jobs

    if "OMP_NUM_THREADS" not in os.environ:  # which torch has read
        torch.set_num_threads(int(threads(size)))
    run_jobs(rank, size, folder, jobs=jobs, config=runtime, run=importlib.import_module(worker).run)


def _watch(ranks: list[ForkServerProcess], results: Path, timeout_s: float) -> str:
    seen, deadline = 0, time.monotonic() + timeout_s
    while True:
        codes = [process.exitcode for process in ranks]
        if all(code == 0 for code in codes):
            return ""
        if any(codes):
            grace = time.monotonic() + GRACE_S
            while time.monotonic() < grace and None in (process.exitcode for process in ranks):
                time.sleep(POLL_S)
            return _first_lost([process.exitcode for process in ranks], results)
        if (size := results.stat().st_size) != seen:
            seen, deadline = size, time.monotonic() + timeout_s
        if time.monotonic() > deadline:
            return f"no result within {timeout_s:g} s (runtime.timeout_s): a rank hangs, or needs longer"
        time.sleep(POLL_S)


def _first_lost(codes: list[int | None], results: Path) -> str:
    """How the rank ended that the others lost. Which died first cannot be seen, as peers follow within milliseconds:
    it is one that ended by another way than an exception (code 1), or one that left no error, or the first that did."""
    wrote = [line["rank"] for line in map(json.loads, results.read_text().splitlines()) if "error" in line]
    bad = [rank for rank, code in enumerate(codes) if code]
    killed = [rank for rank in bad if codes[rank] != 1]
    rank = [*killed, *(rank for rank in bad if rank not in wrote), *wrote][0]
    code = codes[rank] or 0
    return f"rank {rank} " + (f"was ended by signal {-code}" if code < 0 else f"exited with code {code}")


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for result in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        before = results.get(result["name"], {})
        results[result["name"]] = before if "error" in before else before | result  # the first error says why
    return results


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return text[-TAIL:] if text else "(no output)"
