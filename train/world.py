"""The environment that torchrun gives a process, read here and nowhere else. Torch is not imported."""

from __future__ import annotations

import os
from dataclasses import dataclass

RUN_FILE = "STRATEGY_LAB_RUN_FILE"


@dataclass(frozen=True)
class World:
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    from_torchrun: bool
    run_file: str = ""  # where rank 0 writes the run's directory, for the program that started it

    @classmethod
    def single(cls) -> World:
        return cls(0, 0, 1, 1, from_torchrun=False)

    @classmethod
    def from_env(cls) -> World:
        """Plain `python train/main.py` is a world of one."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            world_size=int(os.environ.get("WORLD_SIZE", 1)),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            from_torchrun="RANK" in os.environ,
            run_file=os.environ.get(RUN_FILE, ""),
        )


def quiet_profiler() -> None:
    """Before torch is loaded: its libraries would say from every rank that they begin and end to record a step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
