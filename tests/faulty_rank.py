"""Ranks that sum in a loop until one of them fails: python tests/faulty_rank.py FAULT DEVICE NPROC RESTARTS TIMEOUT_S

Without RANK in the environment it is the launcher, which starts itself as launch.local starts train/main.py. Only the
first start fails: when the ranks have been started again, they end after some steps.
"""

import os
import signal
import sys
import time

from launch.start.environment import local_environment, torchrun_line
from launch.start.foreground import run_here
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.parent import bind_to_parents
from train.command.resources import path_of
from train.config.problems import BadInput, Problem, Reported
from train.config.schema import RuntimeConfig
from train.config.world import World

STEPS, FAULTY_STEP, FAULTY_RANK = 20, 5, 1


class NoLuck(Reported):
    exit_code = 3
    of_one_rank = True


def launch(fault: str, device: str, nproc: int, restarts: int, timeout_s: float) -> int:
    line = torchrun_line([fault, device, str(timeout_s)], nproc, restarts=restarts)
    line[line.index(path_of("train/main.py"))] = __file__
    env, _ = local_environment(nproc, os.environ)
    return run_here(line, env, restarts=restarts, timeout_s=timeout_s)


def work(world: World, fault: str, device: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    from train.ranks.distributed import choose_runtime, process_group

    if fault == "deaf":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    endless = fault in ("works", "deaf") and not world.restarts_done
    runtime = choose_runtime(RuntimeConfig(device), world)
    with process_group(runtime, world, timeout_s):
        step = 0
        while step < STEPS or endless:
            step += 1
            total = torch.ones(1, device=runtime.device)
            dist.all_reduce(total)
            assert total == world.world_size
            if world.rank == 0 and step == FAULTY_STEP:
                print("working", flush=True)
            faulty = world.rank == FAULTY_RANK or fault == "refuses"
            if faulty and step == FAULTY_STEP and not world.restarts_done:
                fail(fault)
            time.sleep(0.01)


def fail(fault: str) -> None:
    if fault in ("SIGKILL", "SIGSEGV", "SIGSTOP"):
        os.kill(os.getpid(), signal.Signals[fault])
    elif fault == "raises":
        raise ValueError("no luck")
    elif fault == "exits":
        os._exit(77)
    elif fault == "hangs":
        time.sleep(600)
    elif fault == "reports":
        raise NoLuck("no luck left")
    elif fault == "refuses":
        raise BadInput(Problem("luck", "luck=0 is too small", "use luck=1"))


def rank(fault: str, device: str, timeout_s: float) -> None:
    leave_on_interrupt()
    with reported_once(World.single()):
        world = World.from_env()
        bind_to_parents(world)
    with reported_once(world):
        work(world, fault, device, timeout_s)


if __name__ == "__main__":
    fault, device, *numbers = sys.argv[1:]
    if "RANK" in os.environ:
        rank(fault, device, float(numbers[0]))
    else:
        nproc, restarts, timeout_s = numbers
        sys.exit(launch(fault, device, int(nproc), int(restarts), float(timeout_s)))
