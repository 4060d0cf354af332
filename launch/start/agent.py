"""Run torchrun for one point of a sweep in this process: python -m launch.start.agent PARENT LOCK argument …

It ends when PARENT, the sweep's process, ends. Until then it has a shared lock on the file LOCK.
"""

from __future__ import annotations

import os
import sys

from launch.start.environment import become_torchrun
from train.command.process.exits import reported_once
from train.command.process.parent import die_with, share_lock
from train.config.world import World


def main(parent: str, lock: str, *line: str) -> None:
    with reported_once(World.single()):
        die_with(int(parent))
        os.set_inheritable(share_lock(lock), True)  # torchrun's ranks do not inherit it; they lock the file themselves
    become_torchrun(line, os.environ)


if __name__ == "__main__":
    main(*sys.argv[1:])
