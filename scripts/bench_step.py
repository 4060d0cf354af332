"""Measures how much time the lab adds to a bare PyTorch loop over the same model, and a strategy to one process.

    python scripts/bench_step.py model=tiny                          compare `single` with the bare loop
    torchrun --nproc_per_node=2 scripts/bench_step.py strategy=dp    the step time of a strategy, for a table
    … peer=torchtitan                                                torchtitan's own step of the same shapes too

The loops run in turns, step by step, in one process, so that a slowdown of the machine affects all of them. The ratios
are medians over neighbouring steps, with a 95 % interval by bootstrap. `lab` is the loop of train/main.py, `silent` is
the same loop without logging, and `bare` is a loop as one would write it without the lab. Then RECORDED steps are
recorded by the profiler, like every `metrics.profile_every`-th step; their time includes reading the recording. It
takes all overrides of train/main.py, and the options that --help shows.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.benching import torchtitan_peer
from train.command import cli, options
from train.command.process.exits import reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config import plain_json
from train.config.schema import Config
from train.config.world import World
from train.data.corpus import load_corpus
from train.measure.hardware import Clock
from train.measure.metrics import Metrics
from train.measure.sampling import Sampler
from train.model.transformer import Transformer, dtypes
from train.model.weights import materialise
from train.ranks.distributed import Runtime, build_mesh, choose_runtime, own_rows, process_group
from train.ranks.optim import lr_at
from train.ranks.side_group import SideGroup
from train.record.run_dir import environment
from train.record.sinks import JsonLines, TensorBoard

WARM_UP, RECORDED = 5, 5
# the work that measures the speed of a machine: `tiny` with 1,024 tokens per step, independent of the defaults
YARDSTICK = (
    *("strategy=single", "model=tiny", "precision=float32", "runtime.device=cpu", "train.seq_len=128"),
    *("train.global_batch_size=8", "train.micro_batch_size=2"),
)
Loop = Callable[[int], None]


def bare_loop(config: Config, device: torch.device, next_batch: Callable[[int], tuple[Tensor, Tensor]]) -> Loop:
    """A loop as one would write it without the lab: the same model, fused AdamW, clipping, accumulation, no logging."""
    param = {**dtypes(config.precision), "compute_dtype": dtypes(config.precision)["param_dtype"]}
    model = Transformer(config.model, **param)
    model.rope = model.rope.to(device)
    materialise(model, "", config.model, seed=config.train.seed, device=device)
    if config.compile.enabled:
        for layer in model.layers.values():
            layer.compile()
        model.loss.compile()
    optimiser = torch.optim.AdamW(model.parameters(), lr=config.optim.lr, fused=True)
    low = config.precision.casts
    num_tokens = config.train.global_batch_size * config.train.seq_len

    def step(index: int) -> None:
        tokens, targets = next_batch(index)
        rows = config.train.micro_batch_size
        for x, y in zip(tokens.split(rows), targets.split(rows), strict=True):
            with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
                loss = model.loss(model(x), y) / num_tokens
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm)
        for group in optimiser.param_groups:
            group["lr"] = lr_at(index, config.train.steps, config.optim)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def lab_loops(
    config: Config, runtime: Runtime, world: World, next_batch: Callable[[int], tuple[Tensor, Tensor]], folder: Path
) -> dict[str, Loop]:
    """One step of the loop of train/main.py: with logging, without logging, and recorded by the profiler."""
    mesh, side_group = build_mesh(config, runtime), SideGroup(world)
    train_step = config.strategy.build(Transformer(config.model, **dtypes(config.precision)), mesh, config)
    sinks = [JsonLines(folder), TensorBoard(folder, {})] if world.rank == 0 else []
    metrics = Metrics(config, side_group, runtime.device, train_step, sinks)

    def logged(profile_every: int) -> Loop:
        own = dataclasses.replace(config.metrics, profile_every=profile_every)
        once = dataclasses.replace(config.train, steps=1)  # so that the first step is recorded
        sampler = Sampler(
            dataclasses.replace(config, metrics=own, train=once), mesh, runtime.device, train_step, side_group
        )

        def step(index: int) -> None:
            lr = lr_at(index, config.train.steps, config.optim)
            with sampler.watch(index):
                result = train_step(*next_batch(index), lr=lr)
            metrics.log(index, result, lr, sampler.collect(index))

        return step

    def silent(index: int) -> None:
        train_step(*next_batch(index), lr=lr_at(index, config.train.steps, config.optim))

    return {"lab": logged(0), "silent": silent, "recorded": logged(1)}


def timed(clock: Clock, step: Loop, index: int) -> float:
    """The ms of one step, with nothing else on the device."""
    start = clock.mark()
    step(index)
    return clock.elapsed_ms(start, clock.mark())


def interval(ratios: list[float]) -> tuple[float, float]:
    """The interval that contains 95 % of the medians of resampled ratios (bootstrap)."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(low), float(high)


def bare_step_ms(steps: int = 9) -> float:
    """The speed of this machine: the median ms of one step of the bare loop on YARDSTICK, with one CPU thread."""
    config, cpu = cli.configured(YARDSTICK), torch.device("cpu")
    torch.set_num_threads(1)
    corpus, rows = load_corpus(config), slice(None)
    step = bare_loop(config, cpu, lambda index: corpus.batch(index, config.train.global_batch_size, rows))
    clock = Clock(cpu)
    times = [timed(clock, step, index) for index in range(1, WARM_UP + steps + 1)]
    return statistics.median(times[WARM_UP:])


def main() -> None:
    with reported_once(World.single()):
        world, argv = World.from_env(), sys.argv[1:]
        bind_to_parents(world)
    with reported_once(world), tempfile.TemporaryDirectory() as folder:
        pairs, peer = options.STEPS.pop(argv), options.PEER.pop(argv)
        default = [] if any(arg.startswith("strategy=") for arg in argv) else ["strategy=single"]
        config, _, _ = cli.parse(cli.parser(options.BENCH_STEP, __doc__ or ""), [*default, *argv], world.rank)
        cli.check(config, world.world_size)
        corpus, runtime = load_corpus(config), choose_runtime(config.runtime, world)
        size = config.train.global_batch_size
        if peer:
            torchtitan_peer.check(config, runtime.device)
        with process_group(runtime, world, config.runtime.timeout_s):
            rows = own_rows(build_mesh(config, runtime), size)

            def next_batch(index: int) -> tuple[Tensor, Tensor]:
                tokens, targets = corpus.batch(index, size, rows)
                return tokens.to(runtime.device, non_blocking=True), targets.to(runtime.device, non_blocking=True)

            loops = lab_loops(config, runtime, world, next_batch, Path(folder))
            recorded = loops.pop("recorded")
            if not config.strategy.mesh_axes():
                loops["bare"] = bare_loop(config, runtime.device, next_batch)
            if peer:
                loops[peer] = torchtitan_peer.peer_loop(config, world, runtime.device, next_batch)
            clock = Clock(runtime.device)
            times: dict[str, list[float]] = {name: [] for name in loops}
            for index in range(1, WARM_UP + pairs + 1):
                order = list(loops) if index % 2 else list(reversed(loops))
                for name in order:
                    times[name].append(timed(clock, loops[name], index))
            extra = [timed(clock, recorded, index) for index in range(RECORDED)]
        if world.rank == 0:
            report(config, runtime, world, {name: values[WARM_UP:] for name, values in times.items()}, extra[1:])


def report(
    config: Config, runtime: Runtime, world: World, times: dict[str, list[float]], recorded: list[float]
) -> None:
    """Print one JSON line with the figures and the environment in which they were measured. `recorded` must not contain
    the first recording, because it starts the profiler."""
    tokens = config.train.global_batch_size * config.train.seq_len
    result = {
        "strategy": config.strategy.name,
        "model": config.model.name,
        "precision": config.precision.value,
        "compiled": config.compile.enabled,
        **{f"{name}_step_ms": round(statistics.median(values), 3) for name, values in times.items()},
        **{f"{name}_tokens_per_s": round(tokens / statistics.median(values) * 1e3) for name, values in times.items()},
        "steps": len(times["lab"]),
        "date": time.strftime("%Y-%m-%d"),
        **environment(runtime.device, runtime.backend, world.world_size),
    }
    for other in [name for name in times if name != "lab"]:
        ratios = [lab / others for lab, others in zip(times["lab"], times[other], strict=True)]
        bounds = [round(bound, 4) for bound in interval(ratios)]
        result |= {f"lab_over_{other}": round(statistics.median(ratios), 4), f"lab_over_{other}_95": bounds}
    step, every = statistics.median(times["lab"]), config.metrics.profile_every
    result["recorded_ms"] = round(statistics.median(recorded), 1)
    if every:
        result[f"recording_pct_every_{every}"] = round(100 * (result["recorded_ms"] - step) / (every * step), 3)
    print(plain_json.dumps(result))


if __name__ == "__main__":
    lasting()
    main()
