"""Measures what this machine's devices can do, for the planner, and compares it with data sheets and other machines.

    python scripts/matmul.py                                            one device: products, attention, memory
    torchrun --nproc_per_node=2 scripts/matmul.py                       two of them, with their messages
    torchrun --nproc_per_node=2 scripts/matmul.py model=small baseline=cpu_x1 hardware.price_usd_per_hour=2.5

It measures square matrix products and those of a model's layers, attention, whole layers, the loss, copies of memory,
the optimiser and, between several processes, every collective and what it costs products beside it. It prints a table,
and writes NAME.yaml into configs/hardware/measured/, which hardware=measured/NAME takes. The model, its precision and
its microbatch are those of the overrides; the default is llama_1b in bf16 on a GPU, and small in float32 on a CPU.
Compiled layers are measured too on an accelerator, or with compile.enabled=true.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from scripts.calibrating import compute, messages, modules, profile_file, roofline, table
from scripts.calibrating.compute import Call
from scripts.calibrating.messages import Groups
from scripts.calibrating.profile_file import Known
from scripts.calibrating.timing import Stopwatch
from train.command import cli, measuring_options
from train.command.planning.profile import OF_ACTIVATIONS, OPS, Profile
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.schema import Config, Precision
from train.config.world import World
from train.measure.hardware import hardware_of
from train.ranks.distributed import Runtime, choose_runtime, process_group
from train.ranks.side_group import SideGroup
from train.record.run_dir import environment
from train.strategies.float8.rules import FP8_SINCE

# The defaults: what a device of the kind is used for here. A layer is measured with parts of the sequence too; with the
# smallest, most of its time is what the host takes to start the operators.
CPU = ("model=small", "precision=float32", "train.seq_len=512", "train.micro_batch_size=2")
GPU = ("model=llama_1b", "precision=bf16", "train.seq_len=4096", "train.micro_batch_size=4")
PARTS = (1, 4, 32)
CPU_S, GPU_S = 150, 45  # the budget
# The shares of the budget after which a kind of measurement stops, in the order in which they are made. The optimiser
# comes first and has the whole budget.
SHARES = {"copy": 0.1, "products": 0.45, "attention": 0.5, "layer": 0.65, "messages": 0.9, "others": 1.0}
Tables = dict[str, list[list[float]]]


def main() -> None:
    leave_on_interrupt()
    with reported_once(World.single(), trains=False):
        world, argv = World.from_env(), sys.argv[1:]
        bind_to_parents(world)
    with reported_once(world, trains=False):
        budget_s, name = measuring_options.BUDGET_S.pop(argv), measuring_options.PROFILE.pop(argv)
        baseline, folder = measuring_options.BASELINE.pop(argv), measuring_options.FOLDER.pop(argv)
        plot = measuring_options.PLOT.pop(argv)
        if plot:
            roofline.check_matplotlib()
        parser = cli.parser(measuring_options.MATMUL, __doc__ or "")
        runtime = choose_runtime(cli.parse(parser, argv, world.rank)[0].runtime, world)
        on_cpu = runtime.device.type == "cpu"
        budget_s = budget_s or (CPU_S if on_cpu else GPU_S)
        argv = [*(CPU if on_cpu else GPU), "strategy=single", *argv]
        config = cli.parse(parser, argv, world.rank)[0]
        cli.check(config, 1)
        before = profile_file.read(baseline) if baseline else None
        with process_group(runtime, world, config.runtime.timeout_s):
            started, side_group = time.perf_counter(), SideGroup(world)
            watch = Stopwatch(runtime.device, side_group, budget_s)
            groups = Groups(world.world_size, world.rank)
            tables = measured(watch, plans_of(config, argv, world.world_size), groups)
            took = time.perf_counter() - started
        if tables.keys() <= {"optimiser"}:
            message = f"budget_s={budget_s} is too short to measure more than the optimiser"
            raise BadInput(Problem("budget_s", message, "use a longer one"))
        if world.rank == 0:
            known = described(config, runtime, world, tables, name)
            print("\n".join(table.lines(known, before)))
            print(f"\nwritten: {profile_file.write(known, folder)}")
            print(table.left_out(watch.left_out, took, budget_s))
            if plot:
                print(roofline.draw(known, plot))


def plans_of(config: Config, argv: Sequence[str], world_size: int) -> list[Plan]:
    """The plans whose products are measured: one process, and tensor parallelism over all of them where it is valid;
    both with whole sequences and with parts of them."""
    configs = [(config, 1)]
    if world_size > 1:
        split = cli.configured([*argv, "strategy=tp"])
        configs += [] if cli.problems(split, world_size) else [(split, world_size)]
    return [
        Plan(dataclasses.replace(one, train=dataclasses.replace(one.train, seq_len=one.train.seq_len // part)), size)
        for one, size in configs
        for part in PARTS
        if one.train.seq_len % part == 0
    ]


def measured(watch: Stopwatch, plans: Sequence[Plan], groups: Groups) -> Tables:
    """The tables of the profile; one without any row is left out."""
    tables: Tables = {}
    for name, rows in _measured(watch, plans, groups, tables):
        if rows:
            tables[name] = rows
    return tables


def _measured(
    watch: Stopwatch, plans: Sequence[Plan], groups: Groups, tables: Tables
) -> Iterator[tuple[str, list[list[float]]]]:
    """`tables`: those that are measured already."""
    config = plans[0].config
    precision, alone = config.precision.value, [plan for plan in plans if plan.world_size == 1]
    calls, squares = compute.model_calls(plans), compute.squares(watch.device)
    yield "optimiser", [*modules.optimiser_rows(watch, config)]
    watch.until(SHARES["copy"])
    yield "copy", [*compute.copy_rows(watch)]
    watch.until(SHARES["products"])
    yield f"products_{precision}", compute.product_rows(watch, [*squares, *calls], precision)
    watch.until(SHARES["attention"])
    yield f"attention_{precision}", modules.attention_rows(watch, plans)
    watch.until(SHARES["layer"])
    for compiled in (False, True) if watch.device.type != "cpu" or config.compile.enabled else (False,):
        end, profile = "_compiled" if compiled else "", Profile(tables, precision, compiled)
        shown = alone[:1] if compiled else alone  # another length would be compiled for any length
        yield f"loss_{precision}{end}", [*modules.loss_rows(watch, shown, compiled=compiled)]
        if {"copy", f"products_{precision}", f"attention_{precision}"} <= tables.keys():
            yield f"layer_{precision}{end}", [*modules.layer_rows(watch, shown, profile)]
    watch.until(SHARES["messages"])
    yield from _messages(watch, groups, precision, calls)
    watch.until(SHARES["others"])
    forward = [call for call in calls if call.kind == "forward"]
    for other in others(config.precision, watch.device):
        yield f"products_{other}", compute.product_rows(watch, [*squares, *forward], other)


def _messages(
    watch: Stopwatch, groups: Groups, precision: str, calls: Sequence[Call]
) -> Iterator[tuple[str, list[list[float]]]]:
    for one in dict.fromkeys(("float32", precision)):
        for op in OPS:
            yield f"{op}_{one}", [*messages.message_rows(watch, groups, op, one)]
    for name, (op, dim) in OF_ACTIVATIONS.items():
        yield f"{name}_{precision}", [*messages.activation_rows(watch, groups, op, dim, calls[0], precision)]
    for op in messages.BESIDE_OPS:
        yield f"overlap_{op}", [*messages.overlap_rows(watch, groups, op, calls[0], precision)]


def others(precision: Precision, device: torch.device) -> list[str]:
    """The other precisions of products, which only the table and the picture show."""
    names = ["bf16", "float32"]
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= FP8_SINCE:
        names.append("fp8")
    return [name for name in names if name != precision.value]


def described(config: Config, runtime: Runtime, world: World, tables: Tables, name: str | None) -> Known:
    """The tables with the name of the profile, the published figures of the device, and the environment."""
    machine = environment(runtime.device, runtime.backend, world.world_size)
    name = name or profile_file.name_of(machine["device"], world.world_size)
    return Known(name, hardware_of(config, runtime.device), tables, machine)


if __name__ == "__main__":
    lasting()
    main()
