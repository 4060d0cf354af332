"""Whether the ranks' state fits in memory. Activations need more memory, so a run may fail even if its state fits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil

from train.command.validate import NUM_FIXES, find_fixes, validate
from train.config.plan import Plan
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config
from train.config.world import World
from train.strategies.equal_ranks import groups_of_equal_ranks
from train.strategies.memory import GiB, Needs, keeps_parameters_sharded, needs, unknown_needs

SMALL = GiB  # for all ranks together: this fits on any machine, so no device is looked up
MAX_TRIED = 1024  # processes up to which other layouts are tried
CGROUP = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Capacity:
    """The memory that there is. `where`: its name in messages. `shared`: whether all ranks share it, as a CPU's memory,
    or each rank has its own."""

    where: str
    bytes: int
    shared: bool


def gib(size: float) -> str:
    """In GiB, to three significant digits."""
    rounded = float(f"{size / GiB:.3g}")
    digits = max(2 - math.floor(math.log10(rounded)), 0) if rounded else 0
    return f"{rounded:,.{digits}f}"


def machine() -> Capacity:
    """This machine's memory, or the part of it that its container may use."""
    size = psutil.virtual_memory().total
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return Capacity("this machine", min(size, int(limit)) if limit.isdigit() else size, shared=True)


def named_device(config: Config) -> Capacity | None:
    """The memory of the device of `hardware=NAME`, or of hardware.memory_gib; None if neither is given."""
    size = config.hardware.memory_gib
    return None if size is None else Capacity(f"hardware={config.hardware.name}", int(size * GiB), shared=False)


@dataclass(frozen=True)
class Ranks:
    """A plan's ranks in groups that hold and send the same, and the memory that each needs. Both are computed once."""

    plan: Plan

    @cached_property
    def groups(self) -> dict[tuple[int, Hashable], list[int]]:
        return groups_of_equal_ranks(self.plan)

    @cached_property
    def needs(self) -> list[Needs]:
        """The needs of one rank of each group, in the groups' order."""
        return [needs(self.plan, ranks[0]) for ranks in self.groups.values()]

    @cached_property
    def largest(self) -> tuple[int, Needs]:
        """(the rank that needs the most memory, its needs)."""
        pairs = zip(self.groups.values(), self.needs, strict=True)
        ranks, most = max(pairs, key=lambda pair: pair[1].state + pair[1].unsharded)
        return ranks[0], most

    @cached_property
    def together(self) -> int:
        """The bytes that all ranks need together."""
        sizes = zip(self.groups.values(), self.needs, strict=True)
        return sum(len(ranks) * (one.state + one.unsharded) for ranks, one in sizes)

    def fit(self, capacity: Capacity) -> bool:
        return (self.together if capacity.shared else self.largest[1].on_device) <= capacity.bytes


def shortage(ranks: Ranks, capacity: Capacity) -> Problem | None:
    """The problem that the ranks do not fit, with overrides that would fit; None if they fit."""
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
    whole = f", and {gib(most.unsharded)} GiB that are gathered within a step" if most.unsharded else ""
    held = most.on_device - most.unsharded
    return f"rank {rank} holds {gib(held)} {of}{whole}, but {capacity.where} has {gib(capacity.bytes)} GiB"


def _smaller(plan: Plan, capacity: Capacity) -> Iterator[str]:
    """Lines of overrides that make a rank's state smaller. They do not change the batch, which is not part of the
    state."""
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
    """The line, with further overrides if the plan would otherwise have problems; empty if it does not fit either."""
    there = plan.override(line)
    if validate(there.config, there.world_size):
        more = next(iter(find_fixes(there)), None)
        if more is None or "nproc=" in more:
            return ""
        line, there = f"{line} {more}", there.override(more)
    return line if Ranks(there).fit(capacity) else ""


def check_memory(config: Config, nproc: int, nodes: int = 1) -> None:
    """Raise BadInput (exit code 3) if the state of all ranks does not fit on this machine or its devices. It imports
    torch if the state is not small, to find the device. `nodes`: the number of machines like this one."""
    plan = Plan(config, nproc)
    if unknown_needs(plan) or Ranks(plan).together <= SMALL:
        return
    capacity = capacity_here(config, nproc // nodes)
    if capacity.shared and nodes > 1:
        capacity = Capacity(f"{nodes} machines like this one together", capacity.bytes * nodes, shared=True)
    problem = shortage(Ranks(plan), capacity)
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
    if not hasattr(module, "get_device_properties"):  # it uses the machine's memory (mps)
        return machine()
    size = module.get_device_properties(device).total_memory
    ranks = -(
        -nproc // max(torch.accelerator.device_count(), 1)
    )  # ranks per device, which communicate over gloo if there are several
    return Capacity(str(module.get_device_name(device)), size // ranks, shared=False)
