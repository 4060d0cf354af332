"""A plan in lines of text: the mesh, and what each rank holds and sends. Equal ranks share a line."""

from __future__ import annotations

from collections.abc import Hashable

from launch.describe.memory import Capacity, Ranks, gib, machine, named_device
from train.config.plan import Plan
from train.config.schema import ModelConfig
from train.config.shapes import chunk, coordinates, element_sizes, units
from train.record.drawing import draw_mesh, ranges
from train.strategies.equal_ranks import sending_key
from train.strategies.expert.split import group_of
from train.strategies.memory import Needs, num_parameters, unsharded_in_a_step
from train.strategies.traffic import expected_traffic

MiB = 2**20
MAX_LINES = 48  # lines for ranks that differ
MAX_NAME = 40  # characters that name the ranks of a line
MAX_MESH = 256  # ranks up to which the mesh is drawn

# (axis, operation, reason, "~" if it is a mean) -> (calls, bytes)
Rows = dict[tuple[str, str, str, str], tuple[int, int]]


def parameters(model: ModelConfig) -> str:
    total, active = num_parameters(model)
    of_a_token = f", {active:,} of them for a token" if active < total else ""
    return f"{total:,} parameters{of_a_token}"


def mesh(plan: Plan) -> str:
    if plan.world_size <= MAX_MESH:
        return draw_mesh(plan.degrees)
    used = {axis: degree for axis, degree in plan.degrees.items() if degree > 1}
    shape = " x ".join(f"{axis} {degree}" for axis, degree in used.items())
    return f"  {shape}: {plan.world_size:,} ranks, of which neighbours differ in {[*used][-1]} first"


def holdings(ranks: Ranks) -> list[str]:
    """What ranks hold: one line for all ranks that hold equal shares of the same modules."""
    plan = ranks.plan
    kept, _ = element_sizes(plan.config.precision)
    everything = kept * num_parameters(plan.config.model)[0]
    groups: dict[tuple[str, Needs], list[int]] = {}
    texts: dict[tuple[int, int], str] = {}
    for ((pp, _), group), size in zip(ranks.groups.items(), ranks.needs, strict=True):
        for rank in group:
            place = coordinates(plan, rank)
            key = (pp, group_of(plan, place))
            if key not in texts:
                texts[key] = modules(plan, place)
            groups.setdefault((texts[key], size), []).append(rank)
    names = [short(ranges(group), len(group)) for group in groups.values()]
    width = max(map(len, [*names, "ranks"]))
    wide = max(map(len, ["modules", *(text for text, _ in groups)]))
    columns = "parameters  gradients  optimiser  together  whole in a step  share of parameters"
    lines = [
        f"held between steps, in GiB; the parameters of the whole model are {gib(everything)} GiB",
        f"  {'ranks':<{width}}  {'modules':<{wide}}  {columns}",
    ]
    for name, (text, one) in zip(names[:MAX_LINES], groups, strict=False):
        sizes = f"{gib(one.parameters):>10}  {gib(one.gradients):>9}  {gib(one.optimiser):>9}  {gib(one.state):>8}"
        share = f"{100 * one.parameters / everything:.1f} %"
        lines.append(f"  {name:<{width}}  {text:<{wide}}  {sizes}  {gib(one.unsharded):>15}  {share}")
    if len(names) > MAX_LINES:
        lines.append(f"  … and {len(names) - MAX_LINES:,} more groups of ranks")
    return lines + memory(ranks, named_device(plan.config) or machine())


def memory(ranks: Ranks, capacity: Capacity) -> list[str]:
    """The memory that is needed, and the memory that there is."""
    rank, most = ranks.largest
    lines = [f"  whole in a step: {unsharded_in_a_step(ranks.plan)}"] if most.unsharded else []
    needed = f"rank {rank} needs the most, {gib(most.on_device)} GiB"
    if capacity.shared:
        needed = f"all {ranks.plan.world_size:,} process(es) together need {gib(ranks.together)} GiB"
    if most.on_host and not capacity.shared:
        lines.append(
            f"  {', '.join(sorted(most.on_host))} wait in the host's memory: {gib(most.offloaded)} GiB per rank"
        )
    verdict = "so the state fits; activations need more" if ranks.fit(capacity) else "so it cannot fit"
    return [*lines, f"  {needed}; {capacity.where} has {gib(capacity.bytes)} GiB, {verdict}"]


def modules(plan: Plan, place: dict[str, int]) -> str:
    """`embed, layers 0-3`, and `experts 0-1` where `ep` splits them, of the rank at `place`."""
    names = [name for name, _ in units(plan, place["pp"])]
    layers = [int(name.partition(".")[2]) for name in names if name.startswith("layers.")]
    ends = [name for name in names if not name.startswith("layers.")]
    before = [name for name in ends if name.startswith("embed")]
    degree, index = plan.ep, group_of(plan, place)
    experts = [f"experts {ranges([*chunk(plan.config.model.num_experts, degree, index)])}"] if degree > 1 else []
    return ", ".join([*before, f"layers {ranges(layers)}", *experts, *(name for name in ends if name not in before)])


def sent(ranks: Ranks) -> list[str]:
    """What ranks send per optimiser step: one block for all ranks that send the same."""
    plan = ranks.plan
    known: dict[Hashable, Rows] = {}
    groups: dict[tuple[tuple[tuple[str, str, str, str], tuple[int, int]], ...], list[int]] = {}
    for (pp, parts), group in ranks.groups.items():
        key = (sending_key(plan, pp), parts)
        if key not in known:
            known[key] = merged(plan, group[0])
        groups.setdefault(tuple(known[key].items()), []).extend(group)
    lines = [f"sent by each rank per optimiser step of {plan.num_microbatches} microbatch(es)"]
    if any(about == "~" for rows in known.values() for _, _, _, about in rows):
        lines.append("  ~: the mean over the axis; what a rank sends depends on the tokens that routers sent to it")
    for rows, group in [*groups.items()][:MAX_LINES]:
        name = short(ranges(sorted(group)), len(group))
        total = sum(size for _, (_, size) in rows) / MiB
        lines.append(f"  rank(s) {name}: {total:.3f} MiB" if rows else f"  rank(s) {name}: nothing")
        for (axis, op, reason, about), (calls, size) in rows:
            lines.append(f"    {axis:<12} {op:<14} {calls:>5} call(s) {about}{size / MiB:>12.6f} MiB  {reason}")
    if len(groups) > MAX_LINES:
        lines.append(f"  … and {len(groups) - MAX_LINES:,} more groups of ranks")
    return lines


def merged(plan: Plan, rank: int) -> Rows:
    """What a rank sends, with all layers added up."""
    rows: Rows = {}
    for row in expected_traffic(plan, rank):
        kind, _, what = row.reason.rpartition(": ") if row.reason.startswith("layers.") else ("", "", row.reason)
        key = (row.axis, row.op, f"each layer: {what}" if kind else what, "~" if row.mean else " ")
        calls, size = rows.get(key, (0, 0))
        rows[key] = (calls + row.calls, size + row.bytes)
    return rows


def total_sent(ranks: Ranks) -> int:
    """The bytes per step of the rank that sends most."""
    seen: dict[Hashable, int] = {}
    for (pp, parts), group in ranks.groups.items():
        key = (sending_key(ranks.plan, pp), parts)
        if key not in seen:
            seen[key] = sum(row.bytes for row in expected_traffic(ranks.plan, group[0]))
    return max(seen.values())


def short(names: str, count: int) -> str:
    return names if len(names) <= MAX_NAME else f"{names[:MAX_NAME].rpartition(',')[0]}, … ({count:,} ranks)"


def degrees(plan: Plan) -> str:
    return " x ".join(f"{axis} {plan.degrees[axis]}" for axis in plan.axes) or "-"
