"""train/main.py with one planted fault: faulty_main.py FAULT MARKER override …

The fault happens once: it makes the folder MARKER first, and does nothing if that exists.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from train import main as program
from train import step
from train.checkpoint import folder, manifest, writing

FAULT, MARKER = sys.argv[1], Path(sys.argv[2])
RANK = int(os.environ.get("RANK", 0))
AT_STEP = 5  # the first after a save


def once() -> bool:
    try:
        MARKER.mkdir()
    except FileExistsError:
        return False
    return True


def killed(condition=lambda *args: True):
    """A function that kills this process before the original runs, if the condition holds."""

    def before(original):
        def changed(*args, **options):
            if condition(*args) and once():
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        return changed

    return before


def at_step(action):
    """Do something on rank 1 in step AT_STEP, instead of the forward and backward."""
    count = 0

    def before(original):
        def changed(self, tokens, targets, **options):
            nonlocal count
            count += 1
            forward_backward = self.forward_backward
            if RANK == 1 and count == AT_STEP and once():
                self.forward_backward = lambda *args: action(forward_backward(*args))
            result = original(self, tokens, targets, **options)
            self.forward_backward = forward_backward
            return result

        return changed

    return before


def fail(loss):
    raise RuntimeError("a planted error")


def wait(loss):
    time.sleep(2)
    return loss


def patch(owner, name, change):
    setattr(owner, name, change(getattr(owner, name)))


FAULTS = {
    "none": lambda: None,
    "killed_while_writing": lambda: patch(
        writing._Hashed, "write", killed(lambda self, data: RANK == 1 and self.size > 2**16)
    ),
    "killed_before_the_manifest": lambda: patch(manifest.Manifest, "write", killed()),
    "killed_before_the_name": lambda: patch(folder.Folder, "commit", killed()),
    "killed_before_latest": lambda: patch(folder.Folder, "accept", killed()),
    "not_finite_on_one_rank": lambda: patch(step.Step, "__call__", at_step(lambda loss: loss * torch.nan)),
    "raises_on_one_rank": lambda: patch(step.Step, "__call__", at_step(fail)),
    "slow": lambda: patch(step.Step, "__call__", at_step(wait)),
    "other_config_on_one_rank": lambda: sys.argv.append("optim.lr=0.5") if RANK == 1 else None,
}

if __name__ == "__main__":
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    FAULTS[FAULT]()
    program.main()
