"""Whether what ranks must hold fits where they run. Activations come on top: what fits here may still be too much."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from launch.describe.equal_ranks import groups_of_equal_ranks
from train.command.validate import NUM_FIXES, find_fixes, validate
from train.config.plan import Plan
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config
from train.config.world import World
from train.strategies.memory import GiB, Needs, keeps_parameters_sharded, needs, unknown_needs

SMALL = GiB  # of all ranks together: this fits anywhere, and no device is asked
MAX_TRIED = 1024  # processes, up to which other layouts are tried
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Capacity:
    """`where` the memory is; `shared` by all ranks of this machine, as a CPU's is, or else each rank's own."""

    where: str
    bytes: int
    shared: bool


def gib(size: float) -> str:
    """In GiB, to three significant digits."""
    rounded = float(f"{size / GiB:.3g}")
    digits = max(2 - math.floor(math.log10(rounded)), 0) if rounded else 0
    return f"{rounded:,.{digits}f}"


def machine() -> Capacity:
    """This machine's memory, or what its container may use of it."""
    size = psutil.virtual_memory().total
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return Capacity("this machine", min(size, int(limit)) if limit.isdigit() else size, shared=True)


def named_device(config: Config) -> Capacity | None:
    """That of `hardware=NAME`, or of hardware.memory_gib."""
    size = config.hardware.memory_gib
    return None if size is None else Capacity(f"hardware={config.hardware.name}", int(size * GiB), shared=False)


@dataclass(frozen=True)
class Ranks:
    """A plan's ranks in groups that hold and send the same, and what each group needs: worked out once."""

    plan: Plan

    @cached_property
    def groups(self) -> dict[tuple[int, Hashable], list[int]]:
        return groups_of_equal_ranks(self.plan)

    @cached_property
    def needs(self) -> list[Needs]:
        """Of a rank of each group, in the groups' order."""
        return [needs(self.plan, ranks[0]) for ranks in self.groups.values()]

    @cached_property
    def largest(self) -> tuple[int, Needs]:
        """(The rank that needs most, its needs)."""
        pairs = zip(self.groups.values(), self.needs, strict=True)
        ranks, most = max(pairs, key=lambda pair: pair[1].state + pair[1].unsharded)
        return ranks[0], most

    @cached_property
    def together(self) -> int:
        """Bytes of all ranks."""
        sizes = zip(self.groups.values(), self.needs, strict=True)
        return sum(len(ranks) * (one.state + one.unsharded) for ranks, one in sizes)

    def fit(self, capacity: Capacity) -> bool:
        return (self.together if capacity.shared else self.largest[1].on_device) <= capacity.bytes


def shortage(ranks: Ranks, capacity: Capacity) -> Problem | None:
    """Why the ranks cannot run there, and what would fit."""
    if ranks.fit(capacity):
        return None
    plan, message = ranks.plan, _too_much(ranks, capacity)
    lines = [*dict.fromkeys(line for one in _smaller(plan, capacity) if (line := _fitting(plan, one, capacity)))][
        :NUM_FIXES
    ]
    words = ["a smaller model"] if capacity.shared else ["a smaller model", "devices with more memory"]
    fix = f"use {' or '.join([*lines, *words])}"
    overrides = tuple(lines[0].split()) if lines else ()
    return Problem("memory", message, fix, overrides, exit_code=EXIT_ENVIRONMENT)


def _too_much(ranks: Ranks, capacity: Capacity) -> str:
    (rank, most), count = ranks.largest, ranks.plan.world_size
    of = "GiB of parameters, gradients and optimiser state"
    if capacity.shared:
        holders = "1 process holds" if count == 1 else f"{count} processes together hold"
        return f"{holders} {gib(ranks.together)} {of}, but {capacity.where} has {gib(capacity.bytes)} GiB"
    whole = f", and {gib(most.unsharded)} GiB that are put together within a step" if most.unsharded else ""
    held = most.on_device - most.unsharded
    return f"rank {rank} holds {gib(held)} {of}{whole}, but {capacity.where} has {gib(capacity.bytes)} GiB"


def _smaller(plan: Plan, capacity: Capacity) -> Iterator[str]:
    """Lines of overrides that make a rank's state smaller: never of the batch, which is no part of it."""
    if plan.world_size > MAX_TRIED:
        return
    axes, sharded = plan.axes, ""
    if "dp_replicate" in axes and "dp_shard" not in axes:
        sharded = f"strategy.dp_replicate=null strategy.dp_shard={axes['dp_replicate']}"
        yield sharded
    elif "dp_shard" in axes and not keeps_parameters_sharded(plan):
        sharded = "strategy.zero_stage=3"
        yield sharded
    if capacity.shared:
        return
    for nproc in (plan.world_size * factor for factor in (2, 4, 8, 16, 32, 64)):
        yield f"{sharded} nproc={nproc}".strip()


def _fitting(plan: Plan, line: str, capacity: Capacity) -> str:
    """The line, with what must change beside it for a plan without problems; empty if that does not fit either."""
    there = plan.override(line)
    if validate(there.config, there.world_size):
        more = next(iter(find_fixes(there)), None)
        if more is None or "nproc=" in more:
            return ""
        line, there = f"{line} {more}", there.override(more)
    return line if Ranks(there).fit(capacity) else ""


def check_memory(config: Config, nproc: int) -> None:
    """Raise BadInput (exit code 3) if this machine, or its devices, cannot hold what all ranks must. Loads torch where
    the state is not small, to know on which device it will be."""
    plan = Plan(config, nproc)
    if unknown_needs(plan) or Ranks(plan).together <= SMALL:
        return
    problem = shortage(Ranks(plan), capacity_here(config, nproc))
    if problem is not None:
        raise BadInput(dataclasses.replace(problem, fix=f"{problem.fix}; force=true starts it nevertheless"))


def capacity_here(config: Config, nproc: int) -> Capacity:
    if config.runtime.device == "cpu":
        return machine()
    import torch

    from train.ranks.distributed import choose_runtime

    device = choose_runtime(config.runtime, World(0, 0, nproc, nproc, from_torchrun=True)).device
    if device.type == "cpu":
        return machine()
    module = torch.get_device_module(device)
    if not hasattr(module, "get_device_properties"):  # its memory is the machine's (mps)
        return machine()
    size = module.get_device_properties(device).total_memory
    ranks = -(-nproc // max(torch.accelerator.device_count(), 1))  # that share a device, over gloo
    return Capacity(str(module.get_device_name(device)), size // ranks, shared=False)
