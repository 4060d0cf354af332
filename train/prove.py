"""What each rank of a proving world runs: a list of jobs, one after the other, in one process group.

Started by `launch/world.py`, argv: rank, world size, folder. The folder holds jobs.json and the references;
results.jsonl is written there, by rank 0, and by any rank for an error. A job that raises ends its world: the other
ranks may be waiting inside one of its collectives.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from train import cli
from train.config import Config
from train.data import load_corpus
from train.distributed import choose_runtime, process_group
from train.proof import BOUNDS, collect, compare
from train.world import World

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One config to run. `save`: keep its evidence in this file; else it is compared with the one in `reference`."""

    name: str
    overrides: list[str]
    save: str = ""
    reference: str = ""


def run(job: Job, world: World, folder: Path) -> Result:
    """Collective; the verdicts are rank 0's."""
    config = configured(job.overrides)
    cli.check(config, world.world_size)
    started = time.perf_counter()
    found = collect(config, choose_runtime(config.runtime, world), load_corpus(config))
    result: Result = {"seconds": time.perf_counter() - started}
    if world.rank > 0:
        return result
    if job.save:
        torch.save(found, folder / job.save)
    else:
        reference = torch.load(folder / job.reference, weights_only=False)
        lossy = config.strategy.lossy()
        bound = max(BOUNDS[config.precision], (lossy and lossy.bound) or 0.0)
        verdicts = compare(found, reference, bound, config.strategy.differs())
        result["verdicts"] = [dataclasses.astuple(v) for v in verdicts]
    return result


def configured(overrides: list[str]) -> Config:
    return cli.parse(cli.parser("proof", ""), overrides)[0]


def main(run: Callable[[Job, World, Path], Result] = run) -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_float32_matmul_precision("highest")  # float32 means float32: no TF32
    world = World(rank, rank, size, size, from_torchrun=True)
    tasks = json.loads((folder / "jobs.json").read_text())
    config = configured(tasks["runtime"]).runtime
    store = dist.FileStore(str(folder / "store"), size)
    store.set_timeout(timedelta(seconds=config.timeout_s))
    with process_group(choose_runtime(config, world), world, config.timeout_s, store):
        for job in (Job(**values) for values in tasks["jobs"]):
            try:
                result = run(job, world, folder)
            except Exception:
                write(folder, {"name": job.name, "rank": rank, "error": traceback.format_exc()})
                raise
            if rank == 0:
                write(folder, {"name": job.name, **result})


def write(folder: Path, result: Result) -> None:
    with (folder / "results.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
