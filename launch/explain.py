"""Describe a run without starting it: python -m launch.explain strategy=tp_pp nproc=4

Prints the mesh, what each rank holds and the memory that there is, a pipeline's schedule, what each rank sends per
optimiser step, and every problem. Takes every override that train/main.py takes, and the options that --help shows.
With several values, as strategy=dp,fsdp or nproc=4,8 (Hydra's grammar, as in launch.sweep), it prints one line per
combination. hardware=NAME chooses the device whose memory is compared; without it, this is the machine's memory. With
nodes=2 it says which axes of the mesh stay inside a machine, and which cross. If there is a problem, the exit code is 2
or 3, and only what is still known is printed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from launch.cluster.size import Size
from launch.describe.description import degrees, holdings, mesh, parameters, sent, total_sent
from launch.describe.memory import Capacity, Ranks, gib, machine, named_device, shortage
from launch.describe.nodes import across, crossing, listed
from launch.describe.schedule import picture, step_bubble
from launch.local import check_folder, check_text
from launch.start.device import laid_out
from launch.sweeping.grid import Point, expand
from train.command import cli, options
from train.command.launching.nodes import NODES
from train.command.planning import auto
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import BadInput, Problem, problem_lines
from train.config.rules import batch
from train.config.schema import Config
from train.config.world import World
from train.strategies.memory import unknown_needs
from train.strategies.traffic import unknown_traffic

MiB = 2**20
# rules about how the batch is divided, which does not change what ranks hold
OF_THE_BATCH = {*(rule.name for rule in batch.RULES), "microbatches_and_stages", "schedule"}
OF_THE_MACHINE = {"memory", "extra", "metrics_dir"}


def main() -> None:
    with reported_once(World.single()):
        parser = cli.parser(options.EXPLAIN, __doc__ or "")
        argv = sys.argv[1:]
        nodes = NODES.pop(argv)
        args = parser.parse_intermixed_args(argv)
        points = expand(args.overrides)
        if args.help:
            cli.show_help(parser, [auto.stood_in(point.overrides) for point in points])
        for point in points:
            Size(nodes, point.nproc)
        flags = [*(["--cfg", args.cfg] if args.cfg else []), *(["--multirun"] if args.multirun else [])]
        chosen = [laid_out(point.overrides, point.nproc) for point in points]
        plans = [
            Plan(cli.parse(parser, [*words, *flags])[0], point.nproc)
            for (words, _), point in zip(chosen, points, strict=True)
        ]
        found = [problems(plan.config, plan.world_size) for plan in plans]
        lines = explained(plans[0], found[0], nodes) if len(plans) == 1 else side_by_side(points, plans, found, nodes)
        print("\n".join([*(line for _, said in chosen for line in said), *lines]))
    if codes := [problem.exit_code for each in found for problem in each]:
        raise SystemExit(min(codes))


def problems(config: Config, nproc: int) -> list[Problem]:
    """All problems: of the config, the packages that it needs, its text, the folder of its runs, and the memory of the
    device of `hardware=NAME`."""
    found = cli.problems(config, nproc)
    if any(problem.rule.startswith("range of") for problem in found):
        return found  # the text cannot be checked with such numbers
    for check in (lambda: check_text(config, nproc), lambda: check_folder(config.metrics.dir)):
        try:
            check()
        except BadInput as error:
            found += error.problems
    plan, capacity = Plan(config, nproc), named_device(config)
    if capacity is not None and can_say(plan, found) and (problem := shortage(Ranks(plan), capacity)):
        found.append(problem)
    return found


def can_say(plan: Plan, found: list[Problem]) -> bool:
    """Whether it is known what the ranks hold, in spite of the problems that were found."""
    of_the_layout = {problem.rule for problem in found if problem.rule not in OF_THE_BATCH}
    return unknown_needs(plan) is None and not of_the_layout - OF_THE_MACHINE


def explained(plan: Plan, found: list[Problem], nodes: int = 1) -> list[str]:
    strategy, model, ranks = plan.config.strategy, plan.config.model, Ranks(plan)
    lines = [f"strategy {strategy.name} on {plan.world_size} process(es), model {model.name}"]
    if not any(problem.rule.startswith("range of") for problem in found):
        lines[0] += f": {parameters(model)}"
    if lossy := strategy.lossy():
        lines += ["", str(lossy)]
    if differs := strategy.differs():
        lines += ["", "expected to differ from one device", *(f"  {name}: {why}" for name, why in differs.items())]
    if math.prod(plan.degrees.values()) == plan.world_size:
        lines += ["", "mesh", mesh(plan)]
        lines += ["", *crossing(plan, nodes)] if nodes > 1 else []
    if can_say(plan, found):
        lines += ["", *holdings(ranks)]
    elif why := unknown_needs(plan):
        lines += ["", f"held: {why}"]
    if not {problem.rule for problem in found} - OF_THE_MACHINE:
        if "pp" in plan.axes:
            lines += ["", *picture(plan)]
        why = unknown_traffic(plan)
        lines += ["", *([f"sent: {why}"] if why else sent(ranks))]
    if found:
        lines += ["", "problems", *(f"  {line}" for line in problem_lines(found))]
    return lines


def side_by_side(
    points: Sequence[Point], plans: Sequence[Plan], found: Sequence[list[Problem]], nodes: int = 1
) -> list[str]:
    """A table with one line per point, for the rank that needs the most memory and the rank that sends most."""
    head = ["", "degrees", "parameters", "gradients", "optimiser", "together", "whole in a step", "fits"]
    rows = [[*head, "sent MiB", "bubble %"]]
    here = machine()
    for point, plan, wrong in zip(points, plans, found, strict=True):
        label = point.label if "nproc=" in point.label else f"{point.label} nproc={point.nproc}"
        rows.append([label, degrees(plan), *figures(plan, wrong, here)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}" for i, (cell, width) in enumerate(pairs)).rstrip()
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    capacity = {named.where if (named := named_device(plan.config)) else here.where for plan in plans}
    lines.insert(0, f"GiB of the rank that holds the most; fits: in the memory of {', '.join(sorted(capacity))}")
    if nodes > 1:
        lines += ["", f"axes across {nodes} nodes"]
        pairs = [(point, plan) for point, plan, wrong in zip(points, plans, found, strict=True) if not wrong]
        lines += [f"  {point.label}: {listed(plan, across(plan, nodes))}" for point, plan in pairs]
    for point, wrong in zip(points, found, strict=True):
        if wrong:
            lines += [
                "",
                f"problems of {point.label} nproc={point.nproc}",
                *(f"  {line}" for line in problem_lines(wrong)),
            ]
    return lines


def figures(plan: Plan, found: list[Problem], here: Capacity) -> list[str]:
    if not can_say(plan, found):
        return ["-"] * 8
    ranks = Ranks(plan)
    most, fits = ranks.largest[1], ranks.fit(named_device(plan.config) or here)
    sizes = [most.parameters, most.gradients, most.optimiser, most.state, most.unsharded]
    if {problem.rule for problem in found} - OF_THE_MACHINE:
        return [*map(gib, sizes), "yes" if fits else "no", "-", "-"]
    sent_mib = "-" if unknown_traffic(plan) else f"{total_sent(ranks) / MiB:.3f}"
    return [*map(gib, sizes), "yes" if fits else "no", sent_mib, step_bubble(plan)]


if __name__ == "__main__":
    lasting()
    main()
