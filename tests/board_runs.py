"""Run directories with invented figures, written by the product's own sinks, to test the readers of runs."""

from __future__ import annotations

import math

from train.command import cli
from train.config.plan import Plan
from train.record.board import hparams
from train.record.sinks import JsonLines, TensorBoard
from train.strategies.pipeline.timetable import UNITS, actions_by_rank, timetable

STEPS, SAMPLED = 12, (4, 8, 12)
# strategy -> (processes, step ms, MiB held, memory GiB, exposed communication %, bubble %): none the same as another's
FIGURES = {
    "single": (1, 1000.0, 40.0, 1.5, None, None),
    "dp": (4, 400.0, 40.5, 1.25, 20.0, None),
    "pp": (4, 500.0, 11.0, 0.75, 5.0, 27.5),
    "3d": (8, 320.0, 5.25, 0.625, 35.0, 12.0),
    "ds_zero1": (4, 4500.0, 25.0, 1.125, 60.0, None),  # far from the others, and must be on the charts nevertheless
}
AXIS_OF = {"dp": "dp_replicate", "pp": "pp", "3d": "tp", "ds_zero1": "dp_shard"}


def config_of(strategy, *overrides):
    return cli.parse(cli.parser("test", ""), [f"strategy={strategy}", *overrides])[0]


def values_of(strategy, step, config):
    """The values of a step; a sampled step has more of them. `single` sends nothing, and only `pp` and `3d` have a
    bubble."""
    nproc, step_ms, held, memory_gib, exposed, bubble = FIGURES[strategy]
    step_ms *= 3 if step == 1 else 1 + 0.02 * math.sin(step)
    tokens_per_s = 1e3 * config.train.global_batch_size * config.train.seq_len / step_ms
    values = {
        "train/loss": 5.5 * math.exp(-step / 20), "train/grad_norm": 1.0, "train/lr": 1e-3, "perf/step_ms": step_ms,
        "perf/tokens_per_s": tokens_per_s, "perf/tokens_per_s_per_device": tokens_per_s / nproc,
        "memory/resident_gib": memory_gib,
    }  # fmt: skip
    for kind, share in (("parameters", 0.25), ("gradients", 0.25), ("optimiser", 0.5)):
        values[f"memory/{kind}_mib"] = share * held
        values |= {f"memory_by_rank/{kind}_mib/rank_{r}": share * held * (1 if r == 0 else 0.9) for r in range(nproc)}
    if strategy in AXIS_OF:
        values |= {f"comm/{AXIS_OF[strategy]}/all_reduce_mib": 2 * held, "comm/lab/gather_mib": 99.0}
    if step not in SAMPLED:
        return values
    if exposed is not None:
        rest = (1 - exposed / 100) * step_ms
        values |= {"time/communication_ms": exposed / 100 * step_ms, "time/step_ms": step_ms}
        shares = {"data": 0.01, "forward": 0.3, "backward": 0.6, "optimiser": 0.08, "other": 0.01}
        values |= {f"time/{part}_ms": share * rest for part, share in shares.items()}
    values |= {"memory_at_peak/parameters_mib": held / 4, "memory_at_peak/activations_mib": 9.0}
    if bubble is not None:
        values |= {"pipeline/bubble_pct": bubble, "pipeline/bubble_theory_pct": bubble - 1}
    return values


def validation_loss(strategy):
    return 3.0 + FIGURES[strategy][1] / 1e4


def sample_of(strategy, step, config):
    """A record of samples/step-<N>.json: 1F1B for a pipeline, alternating forwards and backwards for the others."""
    nproc, step_ms, held, *_ = FIGURES[strategy]
    plan = Plan(config, nproc)
    stages, m = plan.degrees["pp"], plan.num_microbatches
    table = timetable(actions_by_rank("1f1b", stages, stages, m), stages)
    unit = 0.9 * step_ms / table.length
    ranks = []
    for rank in range(nproc):
        row = table.rows[rank * stages // nproc]
        timeline = [[a.kind, a.stage, a.microbatch, at * unit, (at + UNITS[a.kind]) * unit] for at, a in row]
        kinds = {"parameters": held / 4, "gradients": held / 4, "optimiser": held / 2, "activations": 8.0 + rank}
        curve = [[i * step_ms / 50, held + (8 + rank) * math.sin(math.pi * i / 50)] for i in range(50)]
        parts = {"forward": 0.3 * step_ms, "backward": 0.6 * step_ms, "optimiser": 4.0 + rank, "communication": 9.0}
        ranks.append({"rank": rank, "parts_ms": parts, "step_ms": step_ms, "comm": {}, "timeline": timeline,
                      "memory": {"at_peak_mib": kinds, "curve": curve}})  # fmt: skip
    return {"step": step, "ranks": ranks}


def write_run(folder, strategy, *, complete=True, steps=STEPS):
    """Write a run directory, with validations in the middle and at the end. If it is not `complete`, it looks like that
    of a killed run: the sinks get no summary."""
    nproc = FIGURES[strategy][0]
    config = config_of(strategy)
    degrees = Plan(config, nproc).degrees
    shown = "-".join(f"{axis}{degrees[axis]}" for axis in config.strategy.mesh_axes())
    path = folder / "-".join(part for part in (strategy, shown, f"ws{nproc}", "0a1b2c") if part)
    path.mkdir(parents=True)
    flat = hparams(config, nproc, "invented")
    board = TensorBoard(path, {"mesh": "a mesh"}, flat, degrees=degrees, warmup_steps=config.metrics.warmup_steps)
    sinks = [JsonLines(path), board]
    for step in range(1, steps + 1):
        for sink in sinks:
            sink.write(step, values_of(strategy, step, config))
            if step in SAMPLED:
                sink.sample(step, sample_of(strategy, step, config))
            if step == STEPS // 2:
                sink.write(step, {"validation/loss": 5.0})
    if not complete:
        sinks[0].close()
        return path
    for sink in sinks:
        sink.write(steps, {"validation/loss": validation_loss(strategy)})
        sink.summary({})
        sink.close()
    return path
