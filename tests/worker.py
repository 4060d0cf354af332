"""A rank of a test world: it runs `train/proof/jobs.py` or the check that a job names, with its planted bug."""

import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist

from tests import checks, museum, planted
from train.proof import jobs

BUGS = planted.BUGS | museum.BUGS
warnings.filterwarnings("error", category=DeprecationWarning, module="train")


def run(job: jobs.Job, site: jobs.Site) -> jobs.Result:
    words = dict(word.split(":", 1) for word in job.name.split() if word.startswith(("CHECK:", "BUG:")))
    counter = planted.Counter()
    with BUGS[words["BUG"]](counter) if "BUG" in words else nullcontext():
        if "CHECK" in words:
            result = getattr(checks, words["CHECK"])(job.config, site.mesh(job.config))
        else:
            result = jobs.run(job, site)
    return {**result, "patched_calls": on_all_ranks(counter, site) if "BUG" in words else 0}


def on_all_ranks(counter: planted.Counter, site: jobs.Site) -> int:
    """The calls on all ranks together, because some bugs act on one rank only. Collective over the world."""
    calls = torch.tensor(counter.calls, device=site.runtime.device)
    dist.all_reduce(calls)
    return int(calls)
