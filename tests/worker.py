"""What each rank of a test world runs: every row it is given, one process group for all. Started by `worlds.py`.

argv: rank, world size, folder. The folder holds `jobs.json`, the references, and receives `results.jsonl`.
"""

import json
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from tests import planted
from train import cli
from train.data import load_corpus
from train.distributed import choose_runtime, process_group
from train.proof import BOUNDS, Evidence, collect, compare
from train.world import World

TIMEOUT_S = 90.0


def run(overrides: list[str], world: World) -> Evidence:
    config, _, _ = cli.parse(cli.parser("row", ""), overrides)
    cli.check(config, world.world_size)
    return collect(config, choose_runtime(config.runtime, world), load_corpus(config))


def main() -> None:
    rank, size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    world = World(rank, rank, size, size, from_torchrun=True)
    jobs = json.loads((folder / "jobs.json").read_text())
    store = dist.FileStore(str(folder / "store"), size)
    with process_group(choose_runtime(jobs["runtime"], world), world, TIMEOUT_S, store):
        for job in jobs["rows"]:
            started = time.perf_counter()
            result = {"name": job["name"]}
            counter = planted.Counter()
            try:
                with planted.BUGS[job["bug"]](counter) if job.get("bug") else nullcontext():
                    found = run(job["overrides"], world)
                if rank == 0:
                    reference = torch.load(folder / job["reference"], weights_only=False)
                    config, _, _ = cli.parse(cli.parser("row", ""), job["overrides"])
                    verdicts = compare(found, reference, BOUNDS[config.precision])
                    result["verdicts"] = [[v.column, v.name, v.error, v.bound] for v in verdicts]
            except Exception:
                result["error"] = traceback.format_exc()
            result["patched_calls"] = counter.calls
            result["seconds"] = time.perf_counter() - started
            if rank == 0 or "error" in result:
                with (folder / "results.jsonl").open("a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
