"""A world of processes on this machine that runs a list of jobs. It is started once, watched, and always ended.

The ranks find each other through a file, so no port is used. A job that raises, dies or hangs has an error as its
result, and ends its world; the remaining jobs run in a new one. A failure on one rank leads to errors of the others,
which may be in a later job by then: only the first failed job keeps its error, and the later ones run again. Jobs are
sorted by layout, so that jobs with the same layout share a mesh.

A rank is forked from a server (`multiprocessing`'s forkserver) that has already imported the worker and torch, so
starting a world takes only a fork per rank. The server never uses a device, so that ranks may use a GPU.
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

from launch.start.endings import how_ended
from launch.start.environment import own_code, threads
from train.command.process.parent import die_with
from train.config.schema import RuntimeConfig
from train.config.strategy import resolve_degrees

if TYPE_CHECKING:  # it imports torch
    from train.proof.jobs import Job

GRACE_S = 5.0  # after the first rank has failed, the others have this time to notice it and to log it
POLL_S = 0.05
TAIL = 2000  # characters of each rank's log that an error shows


def run_world(
    folder: Path,
    jobs: Sequence[Job],
    *,
    size: int,
    runtime: RuntimeConfig | None = None,
    timeout_s: float,
    worker: str = "train.proof.jobs",
) -> dict[str, dict[str, Any]]:
    """Results by job name: {"verdicts": …}, {"unjudged": sentence} or {"error": text}.

    `worker`: the module whose `run(job, site)` each rank calls. `runtime`: the settings of the process group.
    `timeout_s`: the maximum time between two jobs' results.
    """
    results: dict[str, dict[str, Any]] = {}
    remaining = sorted(jobs, key=lambda job: [*resolve_degrees(job.config.strategy.mesh_axes(), size).values()])
    while remaining:
        attempt = folder / f"world_{size}_{len(jobs) - len(remaining)}"
        attempt.mkdir(parents=True)
        end = _run(attempt, remaining, size, runtime or RuntimeConfig(), worker, timeout_s)
        found = _results(attempt)
        if end:  # the error belongs to the first job that ended a rank or has no result, else to the last job
            names = [job.name for job in remaining]
            dead = next((name for name in names if name not in found or _ended_a_rank(found[name])), names[-1])
            said = found.get(dead, {}).get("error") or "\n".join(
                f"rank {i}: {_tail(attempt / f'rank_{i}.log')}" for i in range(size)
            )
            found = {name: found[name] for name in names[: names.index(dead)]}
            found[dead] = {"name": dead, "error": f"{end}\n{said}"}
        results |= found
        remaining = [job for job in remaining if job.name not in results]
    return results


def _run(folder: Path, jobs: list[Job], size: int, runtime: RuntimeConfig, worker: str, timeout_s: float) -> str:
    """Start the ranks and wait for them. Returns how they failed; empty if they did not fail."""
    context = multiprocessing.get_context("forkserver")
    # what the server imports when it starts, with the first world: the worker, and what most strategies import
    context.set_forkserver_preload(["train.proof.jobs", "train.strategies.pipeline.stages", worker])
    results = folder / "results.jsonl"
    for file in (results, *(folder / f"rank_{rank}.log" for rank in range(size))):
        file.touch()
    ranks = [context.Process(target=_rank, args=(rank, size, folder, jobs, runtime, worker)) for rank in range(size)]
    try:
        with own_code():  # the server, which is started with the first rank, needs it too
            for process in ranks:
                process.start()
        return _watch(ranks, results, timeout_s)
    finally:
        for process in ranks:
            if process.pid is not None:
                process.kill()
                process.join()


def _rank(rank: int, size: int, folder: Path, jobs: list[Job], runtime: RuntimeConfig, worker: str) -> None:
    """What a forked process does: it writes its output to its log and calls `jobs.run_jobs`. It ends with the server,
    which ends when the process that started the world ends."""
    die_with(os.getppid())
    with (folder / f"rank_{rank}.log").open("w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    faulthandler.enable()
    import torch

    from train.proof.jobs import run_jobs

    if "OMP_NUM_THREADS" not in os.environ:  # otherwise torch has read the variable
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
            return f"no result within {timeout_s:g} s (runtime.timeout_s): a rank hangs or needs more time"
        time.sleep(POLL_S)


def _first_lost(codes: list[int | None], results: Path) -> str:
    """How the rank that failed first ended. The order of their ends is not known, as the others follow within
    milliseconds. So this is a rank that did not end by an exception (code 1), else one that reported no error, else the
    first that reported one."""
    wrote = [line["rank"] for line in map(json.loads, results.read_text().splitlines()) if _ended_a_rank(line)]
    bad = [rank for rank, code in enumerate(codes) if code]
    killed = [rank for rank in bad if codes[rank] != 1]
    rank = [*killed, *(rank for rank in bad if rank not in wrote), *wrote][0]
    code = codes[rank] or 0
    return f"rank {rank} {how_ended(code)}"


def _ended_a_rank(result: dict[str, Any]) -> bool:
    """Whether the result is an error that ended a rank, which then names itself. An error in comparing does not."""
    return "error" in result and "rank" in result


def _results(folder: Path) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for result in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        before = results.get(result["name"], {})
        results[result["name"]] = before if "error" in before else before | result  # the first error has the cause
    return results


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return text[-TAIL:] if text else "(no output)"
