"""A rank that fails in the way that BAD_WORKER names, for the tests of how `scripts/verify.py` reports it."""

import os
import time

from tests import planted
from train.proof import jobs


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    kind = os.environ["BAD_WORKER"]
    if site.world.rank == 1 and kind == "dies":
        os._exit(7)
    if site.world.rank == 1 and kind == "hangs":
        time.sleep(600)
    if site.world.rank == 1 and kind == "raises":
        raise RuntimeError("rank 1 has no luck")
    with planted.BUGS["rank_left_out"](planted.Counter()):
        return jobs.run(job, site)
