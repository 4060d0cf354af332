"""A pipeline's schedule in lines of text, before it runs: its picture, and the bubble of a whole step."""

from __future__ import annotations

import dataclasses

from train.config.flops import flops_per_token
from train.config.plan import Plan
from train.record.drawing import MAX_ROWS
from train.strategies.pipeline.placement import SCHEDULES
from train.strategies.pipeline.timetable import (
    UNITS,
    Action,
    actions_by_rank,
    closed_form_bubble,
    draw_schedule,
    most_actions,
    timetable,
)
from train.strategies.traffic import num_actions

MAX_DRAWN = 16  # microbatches in the picture, and stages whose layers are listed


def name_of(plan: Plan) -> str:
    """The name of the plan's schedule. DeepSpeed's only schedule is 1f1b."""
    return plan.config.strategy.schedule_name() or "1f1b"


def picture(plan: Plan) -> list[str]:
    """The schedule over time, drawn for as many microbatches as fit in a line, and the bubble of all microbatches."""
    name, ranks, m = name_of(plan), plan.degrees["pp"], plan.num_microbatches
    accepts = SCHEDULES[name].accepts
    shown = next((n for n in range(min(m, MAX_DRAWN), 0, -1) if accepts(n, ranks, plan.num_stages)), m)
    title = f"schedule {name} of {plan.num_stages} stage(s) on {ranks} rank(s) of pp"
    drawn: list[str] = []
    if ranks > MAX_ROWS or shown > 2 * MAX_ROWS:
        title += ", too large to be drawn"
    else:
        title += "" if shown == m else f", drawn for {shown} of {m} microbatches"
        drawn = [*draw_schedule(name, plan.num_stages, ranks, shown).split("\n"), *legend(plan)]
    return [title, *(f"  {line}" for line in [*drawn, *bubble(plan)])]


def legend(plan: Plan) -> list[str]:
    """What the letters and numbers of the drawing mean."""
    halves = "; I, W backward for the inputs and for the weights" if SCHEDULES[name_of(plan)].splits_backward else ""
    letter = ", a letter its stage on the rank" if plan.num_stages > plan.degrees["pp"] else ""
    return [f"F forward; B -- backward{halves}; the number is the microbatch{letter}; . waits"]


def bubble(plan: Plan) -> list[str]:
    """The fraction of a step in which ranks wait, over all its microbatches, if communication took no time."""
    name, m = name_of(plan), plan.num_microbatches
    closed = closed_form_bubble(name, plan.num_stages, plan.degrees["pp"], m)
    lines = [f"bubble of a step of {m} microbatch(es), if a backward takes twice as long as a forward"]
    lines.append(f"  by the closed form      {'none for this number' if closed is None else percent(closed)}")
    if (actions := num_actions(plan)) > (most := most_actions(name)):
        return [*lines, f"  not replayed: {actions:,} forwards and backwards are more than {most:,}"]
    layers, head = plan.layers_per_stage, head_in_layers(plan)
    lines.append(f"  replayed, by layers     {percent(replayed(plan, 0.0))}  (stages of {listed(layers)} layers)")
    with_head = f"{percent(replayed(plan, head))}  (which takes as long as {head:.2g} layers)"
    return [*lines, f"  replayed, with the head {with_head}"]


def step_bubble(plan: Plan) -> str:
    """The bubble in percent for a table: replayed, or else by the closed form; `-` if there is neither."""
    if "pp" not in plan.axes:
        return "-"
    name, m = name_of(plan), plan.num_microbatches
    if num_actions(plan) <= most_actions(name):
        return f"{100 * replayed(plan, 0.0):.1f}"
    closed = closed_form_bubble(name, plan.num_stages, plan.degrees["pp"], m)
    return "-" if closed is None else f"{100 * closed:.1f}"


def replayed(plan: Plan, head: float) -> float:
    """The bubble of the schedule if the time of a stage is proportional to its layers, and the last stage also computes
    the head, which takes as long as `head` layers."""
    name, layers = name_of(plan), plan.layers_per_stage
    lengths = [*layers[:-1], layers[-1] + head]

    def duration(action: Action) -> float:
        return UNITS[action.kind] * lengths[action.stage]

    rows = actions_by_rank(name, plan.num_stages, plan.degrees["pp"], plan.num_microbatches)
    return timetable(rows, plan.num_stages, duration).bubble


def head_in_layers(plan: Plan) -> float:
    """The FLOPs of the head divided by those of a layer."""
    model, seq_len = plan.config.model, plan.config.train.seq_len
    head = flops_per_token(dataclasses.replace(model, num_layers=0), seq_len)
    return head / (flops_per_token(dataclasses.replace(model, num_layers=1), seq_len) - head)


def listed(layers: list[int]) -> str:
    if len(set(layers)) == 1:
        return str(layers[0])
    return ", ".join(map(str, layers)) if len(layers) <= MAX_DRAWN else f"{min(layers)} to {max(layers)}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"
