"""Train one transformer under any strategy: torchrun --nproc_per_node=4 train/main.py strategy=tp"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path

from omegaconf import DictConfig

from train.command import cli
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.parent import bind_to_parents
from train.command.process.streams import lasting
from train.config.schema import Config
from train.config.world import World, quiet_profiler
from train.data.corpus import Corpus, load_corpus


def main() -> None:
    started = time.perf_counter()
    leave_on_interrupt()
    with reported_once(World.single()):
        world = World.from_env()
        bind_to_parents(world)
    with reported_once(world):
        config, tree, _ = cli.parse(cli.parser("train/main.py", __doc__ or ""), sys.argv[1:], world.rank)
        cli.check(config, world.world_size)
        quiet_profiler()
        train(config, tree, load_corpus(config), world, started)


def train(config: Config, tree: DictConfig, corpus: Corpus, world: World, started: float) -> None:
    # These imports come late, so that a bad command line is answered before torch is loaded.
    from train.checkpoint.agree import agreed
    from train.checkpoint.checkpoints import Checkpoints, start_of
    from train.measure.metrics import Metrics
    from train.measure.out_of_memory import explained
    from train.measure.sampling import Sampler
    from train.model.spans import span
    from train.model.transformer import Transformer, dtypes
    from train.ranks.distributed import build_mesh, choose_runtime, make_deterministic, own_rows, process_group
    from train.ranks.optim import lr_at
    from train.record.report import Report

    runtime = choose_runtime(config.runtime, world)
    if config.train.deterministic:
        make_deterministic()
    with (
        process_group(runtime, world, config.runtime.timeout_s),
        explained(config, runtime.device, world.rank) as watched,
        ExitStack() as opened,  # it closes on an error too, so that no progress bar stands above the message
    ):
        side_group = agreed(tree, corpus, world)
        mesh = build_mesh(config, runtime)
        model = Transformer(config.model, **dtypes(config.precision))
        num_parameters = sum(p.numel() for p in model.parameters())
        train_step = watched.train_step = config.strategy.build(model, mesh, config)
        size, steps = config.train.global_batch_size, config.train.steps
        rows = own_rows(mesh, size)
        start = start_of(config, tree, corpus, num_parameters, side_group, runtime.device.type, train_step)
        report = opened.enter_context(closing(Report.open(config, tree, corpus, world, runtime, num_parameters, start)))
        run = watched.run = Path(side_group.share(str(report.path)))
        checkpoints = opened.enter_context(
            Checkpoints(config, tree, corpus, report, run, start, train_step, side_group)
        )
        sampler = Sampler(config, mesh, runtime.device, train_step, side_group, run, start.step + 1)
        sinks, earlier, signals = report.sinks, report.earlier, checkpoints.signals
        metrics = Metrics(config, side_group, runtime.device, train_step, sinks, earlier, signals)
        opened.enter_context(closing(metrics))

        def evaluate(step: int) -> None:
            metrics.flush()
            loss_sum = num_valid = 0.0
            for index in range(config.train.eval_batches):
                batch = corpus.validation_batch(index, config.train.eval_batches, size, rows)
                loss, valid = train_step.evaluate(*(x.to(runtime.device) for x in batch))
                loss_sum, num_valid = loss_sum + loss.item(), num_valid + valid.item()
            metrics.log_validation(step, loss_sum / num_valid if num_valid else float("nan"))

        for step in range(start.step + 1, steps + 1):
            lr = lr_at(step, steps, config.optim)
            with sampler.watch(step):
                with span("data"):
                    tokens, targets = (x.to(runtime.device, non_blocking=True) for x in corpus.batch(step, size, rows))
                result = train_step(tokens, targets, lr=lr)
            metrics.log(step, result, lr, sampler.collect(step), any_target=corpus.any_target(step, size))
            if step == start.step + 1:
                result.loss.item()  # wait for the device, once
                report.first_step_s = time.perf_counter() - started
            due = config.train.eval_every and step % config.train.eval_every == 0
            if due or step == steps:
                evaluate(step)
                metrics.resume_clock()
            checkpoints.after(step, metrics)
        report.finish(metrics)


if __name__ == "__main__":
    lasting()
    main()
