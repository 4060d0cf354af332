"""How a run ends with an error: one rank prints one message without a traceback, and the exit code gives the cause."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from train.config.problems import EXIT_ENVIRONMENT, Reported
from train.config.world import World

# How long a rank other than 0 waits before it prints. Usually rank 0 finds the same problem, prints it and exits, and
# torchrun ends the other ranks within this time. The wait grows with the time that this rank needed to find the
# problem, as a busy machine is slower.
LEAST_PATIENCE_S, MOST_PATIENCE_S, PATIENCE = 10.0, 60.0, 5.0
HINT = "python -m launch.doctor checks this machine"  # after an error of the environment
GRACE_S = 1.0  # for the other ranks to find the same problem and to exit with its code, not by a signal


@contextmanager
def reported_once(world: World) -> Iterator[None]:
    """Turn a `Reported` error into its message on rank 0 and into its exit code on every rank."""
    try:
        yield
    except Reported as error:
        if world.rank > 0:
            # torchrun kills all ranks when one exits, so rank 0, which prints the message, must exit first
            code = error.exit_code
            signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
            import psutil  # here, so that the doctor can say that it is missing

            found_after_s = time.time() - psutil.Process().create_time()
            time.sleep(min(max(LEAST_PATIENCE_S, PATIENCE * found_after_s), MOST_PATIENCE_S))
            print(
                f"rank {world.rank}:", end=" ", file=sys.stderr
            )  # rank 0 is still running: only this rank has the problem
        hint = f"\n{HINT}" if error.exit_code == EXIT_ENVIRONMENT else ""
        print(f"{error.report()}{hint}", file=sys.stderr, flush=True)
        if world.world_size > 1:
            time.sleep(GRACE_S)
        raise SystemExit(error.exit_code) from None
