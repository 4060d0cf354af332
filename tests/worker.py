"""What each rank of a test world runs: all the rows it is given, in one process group. Started by `worlds.py`.

argv: rank, world size, folder. The folder holds jobs.json and the references; results.jsonl is written there.
A job with "save" keeps its evidence as a reference, one with "check" runs that function of checks.py, and any other is
compared with "reference".
"""

import json
import sys
import time
import traceback
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from tests import checks, planted
from train import cli
from train.data import load_corpus
from train.distributed import choose_runtime, process_group
from train.proof import BOUNDS, collect, compare
from train.world import World

TIMEOUT_S = 60.0


def run(job: dict, world: World, folder: Path) -> dict:
    """One row, or one check. Collective; the verdicts are rank 0's."""
    config, _, _ = cli.parse(cli.parser("row", ""), job["overrides"])
    cli.check(config, world.world_size)
    if "check" in job:
        return getattr(checks, job["check"])(config, choose_runtime(config.runtime, world))
    counter = planted.Counter()
    bug = planted.BUGS[job["bug"]](counter) if job.get("bug") else nullcontext()
    with bug:
        found = collect(config, choose_runtime(config.runtime, world), load_corpus(config))
    result: dict = {"patched_calls": counter.calls}
    if "save" in job:
        torch.save(found, folder / job["save"])
    elif world.rank == 0:
        reference = torch.load(folder / job["reference"], weights_only=False)
        verdicts = compare(found, reference, job.get("bound") or BOUNDS[config.precision])
        result["verdicts"] = [[v.column, v.name, v.error, v.bound] for v in verdicts]
    return result


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    warnings.filterwarnings("error", category=DeprecationWarning, module="train")
    torch.set_num_threads(1)
    world = World(rank, rank, size, size, from_torchrun=True)
    jobs = json.loads((folder / "jobs.json").read_text())
    config, _, _ = cli.parse(cli.parser("world", ""), jobs["runtime"])
    runtime = choose_runtime(config.runtime, world)
    with process_group(runtime, world, TIMEOUT_S, dist.FileStore(str(folder / "store"), size)):
        for job in jobs["rows"]:
            started = time.perf_counter()
            try:
                result = run(job, world, folder)
            except Exception:
                result = {"error": traceback.format_exc()}
            result |= {"name": job["name"], "seconds": time.perf_counter() - started}
            if rank == 0 or "error" in result:
                with (folder / "results.jsonl").open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
