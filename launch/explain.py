"""Say what a run would be, and start nothing: python -m launch.explain strategy=tp_pp nproc=4

Prints the mesh, what each rank holds, a pipeline's schedule, what each rank sends per optimiser step, and every
problem. Takes every override that train/main.py takes, and nproc=N processes (1). Exit code 2 if there is a problem:
then only what can still be said.
"""

from __future__ import annotations

import math
import sys

from launch.local import take
from train import cli
from train.communication import Traffic, expected, unknown
from train.config import Config
from train.data import load_corpus
from train.drawing import draw_mesh, ranges
from train.exits import reported_once
from train.plan import Plan
from train.problems import EXIT_INPUT, BadInput, Problem
from train.rules import batch
from train.shapes import chunk, coordinates, element_sizes, ep_place, held, state_bytes, units, unknown_holdings
from train.strategies.pipeline import Pipeline
from train.strategies.timetable import draw_schedule
from train.streams import lasting
from train.world import World

MiB = 2**20
MAX_DRAWN = 16  # microbatches in a picture
# rules of how the batch is cut, which changes nothing of who holds what
OF_THE_BATCH = {*(rule.name for rule in batch.RULES), "microbatches_and_stages", "schedule"}


def main() -> None:
    with reported_once(World.single()):
        argv = sys.argv[1:]
        nproc = take(argv, "nproc", 1) or 1
        config, _, _ = cli.parse(cli.parser("python -m launch.explain [nproc=N]", __doc__ or ""), argv)
    plan, found = Plan(config, nproc), problems(config, nproc)
    print(f"strategy {config.strategy.name} on {nproc} process(es), model {config.model.name}")
    if lossy := config.strategy.lossy():
        print(f"\n{lossy}")
    if differs := config.strategy.differs():
        print("\nexpected to differ from one device\n" + "\n".join(f"  {name}: {why}" for name, why in differs.items()))
    if math.prod(plan.degrees.values()) == nproc:
        print(f"\nmesh\n{draw_mesh(plan.degrees)}")
    if {problem.rule for problem in found} <= OF_THE_BATCH:
        print("\n" + "\n".join(holdings(plan)))
    if not found:
        if isinstance(config.strategy, Pipeline):
            print("\n" + "\n".join(picture(plan, config.strategy)))
        missing = unknown(plan)
        print(f"\nsent: not known before it runs ({missing})" if missing else "\n" + "\n".join(sent(plan)))
    if found:
        print("\nproblems\n" + "\n".join(f"  {problem}" for problem in found))
        raise SystemExit(EXIT_INPUT)


def problems(config: Config, nproc: int) -> list[Problem]:
    """Of the config, of the packages that it needs and of the text that it trains on."""
    found = cli.problems(config, nproc)
    if any(problem.rule.startswith("range of") for problem in found):
        return found  # no text is cut by such numbers
    try:
        load_corpus(config)
    except BadInput as error:
        found += error.problems
    return found


def holdings(plan: Plan) -> list[str]:
    """A line for the ranks that hold equal shares of the same modules."""
    if missing := unknown_holdings(plan):
        return [f"held: not known before it runs ({missing})"]
    kept, _ = element_sizes(plan.config.precision)
    axes = [*plan.axes, "ep"] if plan.splits_experts else plan.axes
    whole = plan.override(" ".join([*(f"strategy.{axis}=1" for axis in axes), "nproc=1"]))
    everything = kept * sum(map(math.prod, held(whole, 0).values()))
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank in range(plan.world_size):
        key = (modules(plan, coordinates(plan, rank)), tuple(state_bytes(plan, rank).values()))
        groups.setdefault(key, []).append(rank)
    names = [ranges(ranks) for ranks in groups.values()]
    width, modules_width = max(map(len, [*names, "ranks"])), max(len(text) for text, _ in groups)
    lines = [
        f"held between steps, MiB of {everything / MiB:.3f} MiB of parameters",
        f"  {'ranks':<{width}}  {'of':<{modules_width}}  parameters  gradients  optimiser  share of parameters",
    ]
    for name, (text, (parameters, gradients, optimiser)) in zip(names, groups, strict=True):
        sizes = f"{parameters / MiB:>10.3f}  {gradients / MiB:>9.3f}  {optimiser / MiB:>9.3f}"
        lines.append(f"  {name:<{width}}  {text:<{modules_width}}  {sizes}  {100 * parameters / everything:.1f} %")
    return lines


def picture(plan: Plan, strategy: Pipeline) -> list[str]:
    """The pipeline's schedule over time, of so many microbatches as a line has room for."""
    ranks, m = plan.degrees["pp"], plan.num_microbatches
    shown = next((n for n in range(min(m, MAX_DRAWN), 0, -1) if strategy.facts().accepts(n, ranks, plan.num_stages)), m)
    cut = "" if shown == m else f", drawn for {shown} of {m} microbatches"
    title = f"schedule {strategy.schedule} of {plan.num_stages} stage(s) on {ranks} rank(s) of pp{cut}"
    return [
        title,
        *(f"  {line}" for line in draw_schedule(strategy.schedule, plan.num_stages, ranks, shown).split("\n")),
    ]


def modules(plan: Plan, place: dict[str, int]) -> str:
    """`embed, layers 0-3`, and `experts 0-1` where `ep` splits them, of the rank at `place`."""
    names = [name for name, _ in units(plan, place["pp"])]
    layers = [int(name.partition(".")[2]) for name in names if name.startswith("layers.")]
    ends = [name for name in names if not name.startswith("layers.")]
    before = [name for name in ends if name.startswith("embed")]
    degree, index = ep_place(plan, place)
    experts = [f"experts {ranges([*chunk(plan.config.model.num_experts, degree, index)])}"] if degree > 1 else []
    return ", ".join([*before, f"layers {ranges(layers)}", *experts, *(name for name in ends if name not in before)])


def sent(plan: Plan) -> list[str]:
    """Per optimiser step: a block for the ranks that send the same."""
    groups: dict[tuple[Traffic, ...], list[int]] = {}
    for rank in range(plan.world_size):
        groups.setdefault(tuple(expected(plan, rank)), []).append(rank)
    lines = [f"sent by each rank per optimiser step of {plan.num_microbatches} microbatch(es)"]
    if any(row.mean for rows in groups for row in rows):
        lines.append("  ~: the mean over the axis; each rank sends as much as routers sent it")
    for rows, ranks in groups.items():
        total = sum(row.bytes for row in rows) / MiB
        lines.append(f"  rank(s) {ranges(ranks)}: {total:.3f} MiB" if rows else f"  rank(s) {ranges(ranks)}: nothing")
        merged: dict[tuple[str, str, str, str], tuple[int, int]] = {}
        for row in rows:
            kind, _, what = row.reason.rpartition(": ") if row.reason.startswith("layers.") else ("", "", row.reason)
            key = (row.axis, row.op, f"each layer: {what}" if kind else what, "~" if row.mean else " ")
            calls, size = merged.get(key, (0, 0))
            merged[key] = (calls + row.calls, size + row.bytes)
        for (axis, op, reason, about), (calls, size) in merged.items():
            lines.append(f"    {axis:<12} {op:<14} {calls:>5} call(s) {about}{size / MiB:>12.6f} MiB  {reason}")
    return lines


if __name__ == "__main__":
    lasting()
    main()
