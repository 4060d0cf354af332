"""A program that its own keeper starts again and again. Its words say how each start ends: by an exit code, by a signal
(-9), or not (sleeps)."""

import os
import signal
import sys
import time
from pathlib import Path

from train.command.process.keeper import Keeper
from train.command.process.parent import die_with
from train.config.world import AGENT, ROLL, World

_, log, *ends = sys.argv

if ROLL not in os.environ:
    world = World(0, 0, 1, 1, from_torchrun=True, agent=os.getppid(), store=("127.0.0.1", 1))
    raise SystemExit(Keeper(world, timeout_s=2, unit=1).run())
assert os.environ[ROLL].startswith("127.0.0.1:") and int(os.environ[AGENT]) == os.getppid()
die_with(os.getppid())
with Path(log).open("a") as file:
    file.write(f"{os.getpid()}\n")
end = ends[len(Path(log).read_text().splitlines()) - 1]
if end == "sleeps":
    time.sleep(60)
elif int(end) < 0:
    os.kill(os.getpid(), -int(end))
    signal.pause()
raise SystemExit(int(end))
