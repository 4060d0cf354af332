"""The environment that torchrun gives a process, read here and nowhere else. Torch is not imported."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem

RUN_FILE = "STRATEGY_LAB_RUN_FILE"
AGENT = "STRATEGY_LAB_AGENT"
LOCK = "STRATEGY_LAB_LOCK"
ROLL = "STRATEGY_LAB_ROLL"
LAUNCH = "STRATEGY_LAB_LAUNCH"
# For ranks that go on without lost ones: torch's threads that watch nccl (2.11 to 2.13) must not end the process, and
# not look for the errors of groups that are no more. After a time-out they abort the group, and wait 4 x 250 ms before.
NCCL = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "250",
}
RESTARTS_DONE = "TORCHELASTIC_RESTART_COUNT"

# If one of these is set, this process is one of several.
PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# If one of these is missing, torch waits for other processes or raises an error.
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    from_torchrun: bool
    run_file: str = (
        ""  # the file in which rank 0 writes the path of the run's directory, for the program that started it
    )
    agent: int | None = None  # the process id of the torchrun that started this rank, if there is one
    lock: str = ""  # the file whose lock every rank of a sweep shares
    roll: str | None = None  # None if no keeper started this process; else where its keeper keeps the roll, or empty
    # what started the ranks and starts them again after a failure: the same text then, and another one for each
    # command; empty if nothing starts them again
    launch: str = ""
    restarts_done: int = 0  # how often torchrun has started the ranks again
    store: tuple[str, int] | None = None  # the host and port of torchrun's store, if there is one
    one_agent: bool = False  # whether the store is in torchrun's agent, which is the same for all ranks

    @classmethod
    def single(cls) -> World:
        return cls(0, 0, 1, 1, from_torchrun=False)

    @classmethod
    def from_env(cls) -> World:
        """`python train/main.py` without torchrun is a world of one process. Raises BadInput (exit code 3) if variables
        of torchrun are missing or wrong."""
        problem = environment_problem(os.environ)
        if problem:
            raise BadInput(problem)
        told = os.environ.get(AGENT, "")
        run_id = os.environ.get("TORCHELASTIC_RUN_ID")
        agent = int(told) if told.isdigit() else None if run_id is None else os.getppid()
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            from_torchrun="RANK" in os.environ,
            run_file=os.environ.get(RUN_FILE, ""),
            agent=agent,
            lock=os.environ.get(LOCK, ""),
            roll=os.environ.get(ROLL),
            launch=os.environ.get(LAUNCH, "" if run_id is None else f"{run_id}/{agent}"),
            restarts_done=int(os.environ.get(RESTARTS_DONE, 0)) if "RANK" in os.environ else 0,
            store=(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if "RANK" in os.environ else None,
            one_agent=(os.environ.get("TORCHELASTIC_USE_AGENT_STORE"), os.environ.get("GROUP_WORLD_SIZE"))
            == ("True", "1"),
        )


def kept_environment(world: World, roll: str) -> dict[str, str]:
    """The environment of a rank that this process, its keeper in this world, starts. `roll`: HOST:PORT if the keeper
    has the roll."""
    return {**os.environ, **NCCL, ROLL: roll, AGENT: str(os.getpid()), LAUNCH: world.launch}


def environment_problem(env: Mapping[str, str]) -> Problem | None:
    """The first variable of torchrun that is missing from `env` or has an impossible value, as a problem."""
    given = [name for name in PLACE if name in env]
    if not given:
        return None
    shown = ", ".join(f"{name}={env[name]}" for name in given)
    missing = [name for name in NEEDED if name not in env]
    if missing:
        return _refused(f"the environment has {shown}, but no {', '.join(missing)}", given)
    for name in (*given, "MASTER_PORT", *([RESTARTS_DONE] if RESTARTS_DONE in env else [])):
        if not re.fullmatch(r"\d{1,9}", env[name]):
            return _refused(f"the environment has {name}={env[name]}, which is not a number", given)
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        return _refused(f"the environment has {shown}, but ranks count from 0 to WORLD_SIZE - 1", given)
    if "LOCAL_WORLD_SIZE" in env and not (
        int(env.get("LOCAL_RANK", 0)) < int(env["LOCAL_WORLD_SIZE"]) <= int(env["WORLD_SIZE"])
    ):
        return _refused(
            f"the environment has {shown}, but LOCAL_RANK < LOCAL_WORLD_SIZE <= WORLD_SIZE must hold", given
        )
    if not 1 <= int(env["MASTER_PORT"]) <= 65535:
        return _refused(f"the environment has MASTER_PORT={env['MASTER_PORT']}, which is not a port", given)
    return None


def _refused(message: str, given: list[str]) -> Problem:
    fix = f"unset {' '.join(given)}, or use torchrun or python -m launch.local, which set them all"
    return Problem("environment", message, fix, exit_code=EXIT_ENVIRONMENT)


def quiet_profiler() -> None:
    """Silence the profiler's messages, which every rank would print for each recorded step. Call it before torch is
    loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
