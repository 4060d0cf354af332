"""Train one transformer under any strategy: torchrun --nproc_per_node=4 train/main.py strategy=tp"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from train.command import cli
from train.command.process.exits import reported_once
from train.command.process.keeper import Keeper
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config.world import World, quiet_profiler
from train.data.corpus import Corpus, load_corpus

if TYPE_CHECKING:
    from train.ranks.elastic.generations import Generation


def main() -> None:
    started = time.perf_counter()
    with reported_once(World.single()):
        world = World.from_env()
        bind_to_parents(world)
    with reported_once(world):
        config, tree, _ = cli.parse(cli.parser("train/main.py", __doc__ or ""), sys.argv[1:], world.rank)
        cli.check(config, world.world_size)
        if config.runtime.elastic and world.roll is None:
            raise SystemExit(Keeper(world).run())  # the rank is a child of this process, which outlives it
        quiet_profiler()
        corpus = load_corpus(config)
        from train.ranks.elastic.generations import generations  # loads torch, so that bad input is answered before

        for generation in generations(config, world):  # one, unless ranks are lost and come back (runtime.elastic)
            with generation:
                train(tree, corpus, generation, started)


def train(tree: DictConfig, corpus: Corpus, generation: Generation, started: float) -> None:
    from train.measure.metrics import Metrics, figures_of, validation_due
    from train.measure.out_of_memory import explained
    from train.measure.sampling import Sampler
    from train.model.spans import span
    from train.model.transformer import Transformer, dtypes
    from train.ranks.batches import Batches
    from train.ranks.distributed import build_mesh, choose_runtime, make_deterministic, process_group
    from train.ranks.optim import lr_at
    from train.ranks.side_group import SideGroup
    from train.record.report import Report

    config, world = generation.config, generation.world
    runtime = choose_runtime(config.runtime, world)
    if config.train.deterministic:
        make_deterministic()
    with (
        process_group(runtime, world, generation.timeout_s, generation.store()),
        explained(config, runtime.device, world.rank) as watched,
        ExitStack() as opened,  # it closes on an error too, so that no progress bar stands above the message
    ):
        mesh, side_group = build_mesh(config, runtime), SideGroup(world)
        model = Transformer(config.model, **dtypes(config.precision))
        train_step = watched.train_step = config.strategy.build(model, mesh, config)
        batches = Batches(config, corpus, mesh, runtime.device)
        carried = generation.begin(train_step, side_group, runtime.device)  # what was trained before this generation
        report = Report.open(tree, corpus, generation, carried, runtime)
        watched.run = carried.run = Path(side_group.share(str(report.path)))
        sampler = Sampler(config, mesh, runtime.device, train_step, side_group, watched.run)
        metrics = Metrics(config, side_group, runtime.device, train_step, report.sinks, report.results)
        opened.enter_context(closing(metrics))
        if side_group.decide(report.owes_validation):
            metrics.validate(carried.step, batches)

        for step in range(carried.step + 1, config.train.steps + 1):
            lr = lr_at(step, config.train.steps, config.optim)
            with sampler.watch(step):
                with span("data"):
                    tokens, targets = batches.training(step)
                result = train_step(tokens, targets, lr=lr)
            generation.made(step, figures_of(result, lr))
            metrics.log(step, result, lr, sampler.collect(step), any_target=corpus.any_target(step, batches.size))
            carried.note_first(step, result.loss, started)
            if validation_due(config, step):
                metrics.validate(step, batches)
            if generation.changes(step):
                metrics.flush()
                return
        report.finish(metrics, carried.first_step_s)
        generation.end()


if __name__ == "__main__":
    lasting()
    main()
