"""Each rank of a world of sleepers: records a step of each job. The job's name says what is planted."""

import re
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch.distributed._functional_collectives as funcol

from tests import sleeping
from train import prove
from train.distributed import choose_runtime
from train.spans import span
from train.world import World


def slow_waits(seconds: float, calls: list[float]):
    """A slow link: what is waited for comes later."""
    wait = funcol.wait_tensor

    def later(tensor):
        calls.append(seconds)
        with span("wait"):
            time.sleep(seconds)
            return wait(tensor)

    return mock.patch.object(funcol, "wait_tensor", later)


def run(job: prove.Job, world: World, folder: Path) -> prove.Result:
    config = prove.configured(job.overrides)
    late: list[float] = []
    words = dict(re.findall(r"(\w+):(\S+)", job.name))
    with (
        sleeping.layers(float(words["unit"]), words.get("slow_layer", "")) if "unit" in words else nullcontext(),
        slow_waits(float(words["link"]), late) if "link" in words else nullcontext(),
    ):
        result = sleeping.record(config, choose_runtime(config.runtime, world), world)
    return {**result, "late_s": sum(late) / config.train.steps} if world.rank == 0 else {}


if __name__ == "__main__":
    prove.main(run)
