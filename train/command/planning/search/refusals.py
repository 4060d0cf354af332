"""Why a search cannot answer, as one message: the config, the hardware's figures, or the memory."""

from __future__ import annotations

import dataclasses

from train.command import cli
from train.command.planning.search.pricer import Task
from train.command.planning.search.search import Outcome
from train.command.planning.search.words import shown
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.rules.ranges import out_of_range
from train.strategies.memory import GiB
from train.strategies.spmd import Spmd


def check_config(base: Plan) -> None:
    """Raise BadInput for values out of range, with which nothing can be computed."""
    if [*out_of_range(base.config)]:
        raise BadInput(*problems(base))


def problems(base: Plan) -> list[Problem]:
    """The problems of the config with plain data parallelism: those that no layout takes away come with it."""
    return cli.problems(dataclasses.replace(base.config, strategy=Spmd(name="dp", dp_replicate=-1)), base.world_size)


def refused(task: Task, outcome: Outcome) -> Problem:
    """No layout is valid, can be priced, or fits."""
    base = task.base
    if not outcome.valid:
        found = problems(base)
        fix = "use another number of processes or another train.global_batch_size"
        return found[0] if found else Problem("layouts", f"no layout of nproc={base.world_size} is valid", fix)
    hardware = base.config.hardware
    if outcome.unknown and not outcome.priced:
        message = f"hardware={hardware.name} lacks {', '.join(outcome.unknown)}, without which no time can be predicted"
        fix = "give them, as hardware.memory_gb_per_s=3350, use another hardware=NAME, or run scripts/matmul.py there"
        return Problem("figures", message, fix)
    message = f"none of {outcome.valid:,} valid layouts of nproc={base.world_size} fits in hardware={hardware.name}"
    if outcome.nearest is not None and hardware.memory_gib is not None:
        layout, missing = outcome.nearest
        message += (
            f" ({hardware.memory_gib:g} GiB): the nearest, {layout.name} ({shown(layout)}), "
            f"lacks {missing / GiB:,.2f} GiB a device"
        )
    return Problem("memory", message, "use more processes, devices with more memory, or a smaller model or batch")
