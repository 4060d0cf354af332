"""How a run ends with an error: one rank prints one message, and the exit code gives the cause."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from train.config.problems import EXIT_ENVIRONMENT, EXIT_PEER, Reported
from train.config.world import World
from train.ranks.peers import because_of_a_peer

# How long a rank other than 0 waits before it prints. Usually rank 0 finds the same problem, prints it and exits, and
# torchrun ends the other ranks within this time. The wait grows with the time that this rank needed to find the
# problem, as a busy machine is slower.
LEAST_PATIENCE_S, MOST_PATIENCE_S, PATIENCE = 10.0, 60.0, 5.0
HINT = "python -m launch.doctor checks this machine"  # after an error of the environment
GRACE_S = 1.0  # for the other ranks to find the same problem and to exit with its code, not by a signal
# How long a rank that lost another one waits before it prints, as usually the other one prints why it ended, and
# torchrun then ends this rank. It is longer than the time that a rank waits which alone has a problem (ALONE_S). Each
# rank waits a little longer than the one before it, so that one prints for all.
PEER_PATIENCE_S, ALONE_S, APART_S, MOST_APART = 10.0, 5.0, 1.0, 4
# The signals that go from a launcher to torchrun, and from it to the ranks. Without being told, torchrun passes all but
# USR1, which Slurm can send before a job's time is up.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)


@contextmanager
def reported_once(world: World, *, trains: bool = True) -> Iterator[None]:
    """Turn a `Reported` error into its message on rank 0 and into its exit code on every rank. `trains`: whether the
    program trains, so that the message of a `BadInput` says that nothing was trained.

    An error that another rank caused becomes the exit code EXIT_PEER, and one line if torchrun does not end this rank
    first. Any other error is raised again; if all ranks have it, usually only one lives long enough to print it.
    """
    try:
        yield
    except Reported as error:
        if world.rank > 0:
            # torchrun kills all ranks when one exits, so rank 0, which prints the message, must exit first
            import psutil  # here, so that the doctor can say that it is missing

            found_after_s = time.time() - psutil.Process().create_time()
            shared_s = min(max(LEAST_PATIENCE_S, PATIENCE * found_after_s), MOST_PATIENCE_S)
            _wait_for_the_end(error.exit_code, ALONE_S if error.of_one_rank else shared_s)
            print(
                f"rank {world.rank}:", end=" ", file=sys.stderr
            )  # rank 0 is still running: only this rank has the problem
        hint = f"\n{HINT}" if error.exit_code == EXIT_ENVIRONMENT else ""
        print(f"{error.report() if trains else error}{hint}", file=sys.stderr, flush=True)
        if world.world_size > 1:
            time.sleep(GRACE_S)
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        if world.world_size > 1 and (said := because_of_a_peer(error)):
            _follow(world, said)
        if world.rank > 0:
            _wait_for_the_end(1, GRACE_S)
        raise


def leave_on_interrupt() -> None:
    """From now on ctrl-C ends this process in order, with exit code 130 and without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it is ignored in a shell's background
        signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))


def _follow(world: World, said: str) -> NoReturn:
    _wait_for_the_end(EXIT_PEER, PEER_PATIENCE_S + APART_S * min(world.rank, MOST_APART))
    print(f"rank {world.rank} {said}", file=sys.stderr, flush=True)
    raise SystemExit(EXIT_PEER) from None


def _wait_for_the_end(code: int, seconds: float) -> None:
    """Wait so long. A signal ends this process at once with this exit code: no rank can save anything any more."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: os._exit(code))
    time.sleep(seconds)
