"""A rank of a world whose layers sleep: it records a step of each job. The name of the job says what is planted."""

import re
import time
from contextlib import nullcontext
from unittest import mock

import torch.distributed._functional_collectives as funcol

from tests import sleeping
from train.model.spans import span
from train.proof import jobs


def slow_waits(seconds: float, calls: list[float]):
    """Imitate a slow link: every wait takes `seconds` longer."""
    wait = funcol.wait_tensor

    def later(tensor):
        calls.append(seconds)
        with span("wait"):
            time.sleep(seconds)
            return wait(tensor)

    return mock.patch.object(funcol, "wait_tensor", later)


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    config = job.config
    late: list[float] = []
    words = dict(re.findall(r"(\w+):(\S+)", job.name))
    with (
        sleeping.layers(float(words["unit"]), words.get("slow_layer", "")) if "unit" in words else nullcontext(),
        slow_waits(float(words["link"]), late) if "link" in words else nullcontext(),
    ):
        result = sleeping.record(config, site)
    return {**result, "late_s": sum(late) / config.train.steps} if site.world.rank == 0 else {}
