"""Train one transformer under any strategy: torchrun --nproc_per_node=4 train/main.py strategy=tp"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from train.command import cli
from train.command.planning import auto
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.world import World, quiet_profiler
from train.data.corpus import Corpus, load_corpus

if TYPE_CHECKING:
    from train.ranks.elastic.generation import Generation


def main() -> None:
    started = time.perf_counter()
    leave_on_interrupt()
    with reported_once(World.single()):
        world = World.from_env()
        bind_to_parents(world)
    with reported_once(world):
        words = sys.argv[1:]
        quiet_profiler()
        if auto.asked(words):
            from train.checkpoint.resume import planned

            words = planned(words, world)
        config, tree, _ = cli.parse(cli.parser("train/main.py", __doc__ or ""), words, world.rank)
        cli.check(config, world.world_size)
        if config.runtime.elastic and world.roll is None:
            from train.command.process.keeper import Keeper

            unit = Plan(config, world.world_size).degrees["dp_shard"]
            raise SystemExit(Keeper(world, config.runtime.timeout_s, unit).run())  # it starts this program, as a rank
        corpus = load_corpus(config)
        # These imports come late, so that a bad command line is answered before torch is loaded.
        from train.ranks.elastic.generations import generations

        for generation in generations(config, world):  # one, unless ranks are lost and come back (runtime.elastic)
            with generation:
                train(tree, corpus, generation, started)


def train(tree: DictConfig, corpus: Corpus, generation: Generation, started: float) -> None:
    from train.checkpoint.agree import agreed
    from train.checkpoint.checkpoints import Checkpoints, start_of
    from train.checkpoint.teacher import find_teacher, teach
    from train.measure.metrics import Metrics
    from train.measure.out_of_memory import explained
    from train.measure.sampling import Sampler
    from train.model.spans import span
    from train.model.transformer import Transformer, dtypes
    from train.ranks.batches import Batches
    from train.ranks.distributed import build_mesh, choose_runtime, make_deterministic, process_group
    from train.ranks.optim import lr_at
    from train.record.report import Report

    config, world = generation.config, generation.world
    runtime = choose_runtime(config.runtime, world)
    if config.train.deterministic:
        make_deterministic()
    with (
        process_group(runtime, world, generation.timeout_s, generation.store(), generation.close),
        explained(config, runtime.device, world.rank) as watched,
        ExitStack() as opened,  # it closes on an error too, so that no progress bar stands above the message
    ):
        side_group = agreed(tree, corpus, world)
        mesh = build_mesh(config, runtime)
        model = Transformer(config.model, **dtypes(config.precision))
        size = sum(p.numel() for p in model.parameters())
        train_step = watched.train_step = config.strategy.build(model, mesh, config)
        if (teacher := find_teacher(config, side_group)) is not None:
            teach(train_step, teacher, mesh, config)
        batches = Batches(config, corpus, mesh, runtime.device)
        carried = generation.newest(side_group, mesh)
        start = start_of(config, tree, corpus, size, side_group, runtime.device.type, train_step, carried, teacher)
        report = opened.enter_context(closing(Report.open(config, tree, corpus, world, runtime, size, start)))
        run = watched.run = Path(side_group.share(str(report.path)))
        checkpoints = opened.enter_context(
            Checkpoints(config, tree, corpus, report, run, start, train_step, side_group)
        )
        sampler = Sampler(config, mesh, runtime.device, train_step, side_group, run, start.step + 1)
        sinks, earlier, signals = report.sinks, report.earlier, checkpoints.signals
        metrics = Metrics(config, side_group, runtime.device, train_step, sinks, earlier, signals)
        opened.enter_context(closing(metrics))
        generation.begin(train_step, mesh, report, metrics, start.step)
        checkpoints.make_up(start, metrics, batches)

        for step in range(start.step + 1, config.train.steps + 1):
            lr = lr_at(step, config.train.steps, config.optim)
            with sampler.watch(step):
                with span("data"):
                    tokens, targets = batches.training(step)
                result = train_step(tokens, targets, lr=lr)
            generation.made(step, result, lr)
            metrics.log(step, result, lr, sampler.collect(step), any_target=batches.any_target(step))
            if step == start.step + 1:
                result.loss.item()  # wait for the device, once
                report.first_step_s = report.first_step_s or time.perf_counter() - started
                gc.collect()
                gc.freeze()  # what stays is not searched for garbage again, which would stop a step for 0.2 s at times
            if config.train.validates(step):
                metrics.validate(step, batches)
            checkpoints.after(step, metrics)
            if generation.changes(step):
                return
        report.finish(metrics)
        generation.end()


if __name__ == "__main__":
    lasting()
    main()
