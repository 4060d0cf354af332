"""How a run ends badly: one message from one rank, an exit code that says whose fault it is, no traceback of ours."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from train.config.problems import Reported
from train.config.world import World

# By then rank 0, which finds the same problem, has said so and torchrun has ended the others. A busy machine takes
# longer, as this rank did to find it.
LEAST_PATIENCE_S, MOST_PATIENCE_S, PATIENCE = 10.0, 60.0, 5.0
GRACE_S = 1.0  # the others reach the same problem, and exit with its code rather than by a signal


@contextmanager
def reported_once(world: World) -> Iterator[None]:
    """Turn an end that is told in words into its message on rank 0 and its exit code on every rank."""
    try:
        yield
    except Reported as error:
        if world.rank > 0:
            # torchrun kills all ranks when one exits: the first to exit must be the one that speaks
            code = error.exit_code
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
            found_after_s = time.time() - psutil.Process().create_time()
            time.sleep(min(max(LEAST_PATIENCE_S, PATIENCE * found_after_s), MOST_PATIENCE_S))
            print(f"rank {world.rank}:", end=" ", file=sys.stderr)  # rank 0 is well: the problem is this rank's own
        print(error.report(), file=sys.stderr, flush=True)
        if world.world_size > 1:
            time.sleep(GRACE_S)
        raise SystemExit(error.exit_code) from None
