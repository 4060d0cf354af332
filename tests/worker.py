"""What each rank of a test world runs: `train/prove.py`, with the bug that a row's name plants, or a named check."""

import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from tests import checks, planted
from train import prove
from train.distributed import choose_runtime
from train.world import World


def run(job: prove.Job, world: World, folder: Path) -> prove.Result:
    if check := job.name.partition("CHECK:")[2]:
        config = prove.configured(job.overrides)
        return getattr(checks, check)(config, choose_runtime(config.runtime, world))
    bug, counter = job.name.partition("BUG:")[2], planted.Counter()
    with planted.BUGS[bug](counter) if bug else nullcontext():
        result = prove.run(job, world, folder)
    return {**result, "patched_calls": counter.calls}


if __name__ == "__main__":
    warnings.filterwarnings("error", category=DeprecationWarning, module="train")
    torch.set_num_threads(1)
    prove.main(run)
