"""A rank that fails in the way that BAD_WORKER or the name of the job says, for the tests of how this is reported."""

import os
import time
from contextlib import nullcontext
from unittest import mock

from tests import planted
from train.proof import jobs


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    kind, rank = os.environ.get("BAD_WORKER") or job.name, site.world.rank
    if rank == 1 and kind == "dies":
        os._exit(7)
    if rank == 1 and kind == "hangs":
        time.sleep(600)
    if rank == 1 and kind == "raises":
        raise RuntimeError("rank 1 has no luck")
    if kind == "small_reference_fails" and job.save and job.config.train.global_batch_size == 6:
        raise RuntimeError("one device has no luck")
    broken = mock.patch.object(jobs, "compare", side_effect=KeyError("lost.weight"))
    with (
        planted.BUGS["rank_left_out"](planted.Counter()) if kind == "wrong" else nullcontext(),
        broken if kind == "comparing_fails" else nullcontext(),
    ):
        result = jobs.run(job, site)
    if rank == 0 and kind == "rank_0_fails_alone":  # the others have nothing to wait for, so they are in the next job
        raise RuntimeError("rank 0 has no luck")
    return result
