"""What each rank of a test world runs: `train/prove.py` or the check that a job names, with the bug that it plants."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from tests import checks, planted
from train import prove
from train.distributed import choose_runtime
from train.world import World


def run(job: prove.Job, world: World, folder: Path) -> prove.Result:
    words = dict(word.split(":", 1) for word in job.name.split() if word.startswith(("CHECK:", "BUG:")))
    counter = planted.Counter()
    with planted.BUGS[words["BUG"]](counter) if "BUG" in words else nullcontext():
        if "CHECK" in words:
            config = prove.configured(job.overrides)
            result = getattr(checks, words["CHECK"])(config, choose_runtime(config.runtime, world))
        else:
            result = prove.run(job, world, folder)
    return {**result, "patched_calls": counter.calls}


if __name__ == "__main__":
    warnings.filterwarnings("error", category=DeprecationWarning, module="train")
    torch.set_num_threads(1)
    prove.main(run)
