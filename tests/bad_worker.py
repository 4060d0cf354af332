"""A world whose ranks go wrong, as BAD_WORKER says: for the tests of what `scripts/verify.py` answers."""

import os
import time
from pathlib import Path

from tests import planted
from train import prove
from train.world import World


def run(job: prove.Job, world: World, folder: Path) -> prove.Result:
    kind = os.environ["BAD_WORKER"]
    if world.rank == 1 and kind == "dies":
        os._exit(7)
    if world.rank == 1 and kind == "hangs":
        time.sleep(600)
    if world.rank == 1 and kind == "raises":
        raise RuntimeError("rank 1 has no luck")
    with planted.BUGS["rank_left_out"](planted.Counter()):
        return prove.run(job, world, folder)


if __name__ == "__main__":
    prove.main(run)
