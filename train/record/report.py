"""What a run writes beside its metrics: a directory with its config, a summary, and some lines on the terminal."""

from __future__ import annotations

import errno
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from train.command.process.life import FINISHED, STOPPED, Living
from train.config.problems import OF_DISKS, Reported, Unwritable, writable
from train.config.schema import Config
from train.config.strategy import resolve_degrees
from train.config.world import World
from train.data.corpus import Corpus
from train.measure.metrics import Metrics, Sink, close_all
from train.measure.results import LOSS, MEMORY, OF_RECORDED, VALIDATION_LOSS, Record, Results, has_no_target
from train.ranks.distributed import Runtime
from train.record.run_dir import claim, describe_run, write_summary

if TYPE_CHECKING:
    from train.checkpoint.resume import Start
    from train.ranks.elastic.carried import Carried

MEMO = ("run", "facts", "baseline", "first_step_s", "began")
SUMMARY_TAGS = ("perf/step_ms", "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/mfu_pct")


@dataclass
class Report:
    """The report of a run. Only rank 0 writes it; on the other ranks `path` is None."""

    config: Config
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    baseline: float | None = None
    earlier: list[tuple[int, Record]] = field(default_factory=list)  # the records before a resume, with their steps
    living: Living | None = None
    first_step_s: float = 0.0
    began: float = field(default_factory=time.time)
    complete: bool = False

    @classmethod
    def open(
        cls,
        config: Config,
        tree: DictConfig,
        corpus: Corpus,
        world: World,
        runtime: Runtime,
        num_parameters: int,
        start: Start,
    ) -> Report:
        """Print the first lines of the run, lock its directory, which is made unless the run goes on in one, and open
        its sinks. Other ranks than 0 do nothing, and nothing is printed if the ranks only go on in another group.
        Raises BadInput (exit code 3) if the directory cannot be used."""
        if start.carried is not None:
            return cls._go_on(config, tree, world, start.carried)
        if world.rank > 0:
            return cls(config)
        from train.record.printed import announcement, opening
        from train.record.sinks import open_sinks

        threading.excepthook = _but_for_disks
        degrees = resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        # printed before the text is hashed, because this takes time if the text is large
        print(opening(config, corpus, runtime, degrees, world.world_size, num_parameters), flush=True)
        with writable(config.metrics.dir):
            living = claim(config, tree, degrees, world, start.run, start.step)
            path, kept = living.run, None if start.run is None else start.step
            facts = describe_run(config, tree, corpus, world, runtime, degrees, path, start.given)
            facts |= {"continued_after_step": start.step} if start.step else {}
            sinks, earlier = open_sinks(path, config, tree, facts, degrees, world.world_size, kept)
        print(announcement(path, facts), flush=True)
        windows = config.train.eval_batches * config.train.global_batch_size
        baseline = corpus.bigram_loss(windows) if corpus.is_bytes else None
        return cls(config, path, facts, sinks, baseline, earlier, living)

    @classmethod
    def _go_on(cls, config: Config, tree: DictConfig, world: World, carried: Carried) -> Report:
        """The report of a run that another rank may have written until now. The text is not hashed again."""
        run, facts, baseline, first_step_s, began = (carried.report[name] for name in MEMO)
        if world.rank > 0:
            return cls(config, first_step_s=first_step_s)
        from train.record.sinks import open_sinks

        threading.excepthook = _but_for_disks
        path, degrees = Path(run), resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        living = Living(path, carried.step, world.launch)
        sinks, earlier = open_sinks(path, config, tree, facts, degrees, world.world_size, carried.step)
        return cls(config, path, facts, sinks, baseline, earlier, living, first_step_s, began)

    def memo(self) -> dict[str, Any]:
        """What another rank needs to go on with this report, as a JSON value."""
        values = (str(self.path), self.facts, self.baseline, self.first_step_s, self.began)
        return dict(zip(MEMO, values, strict=True))

    @contextmanager
    def alive(self, run: Path) -> Iterator[None]:
        """The context in which the run's directory, `run`, shows how the run ended."""
        try:
            yield
        except Reported as error:
            if self.living is not None and not error.cut_off:
                self.living.end(STOPPED, str(error).splitlines()[0])
            raise
        except OSError as error:
            removed = error.errno == errno.ENOENT and str(run) in str(error.filename)
            if error.errno not in OF_DISKS and not removed:
                raise
            then = self.config.checkpoint.continues(run) or "start the run again"
            raise Unwritable(run, error.strerror, f"free some space; {then}") from error
        if self.living is not None and self.complete:
            self.living.end(FINISHED)

    def close(self) -> None:
        """Close the sinks, unless `Metrics.close` has done it: if the run failed before its first step. Give the run's
        directory back, in which the next generation of an elastic run goes on."""
        close_all(self.sinks)
        if self.living is not None:
            self.living.close()

    def finish(self, metrics: Metrics) -> None:
        """Write summary.json, pass the summary to the sinks, and print the table."""
        self.complete = True
        if self.path is None:
            return
        from train.record.printed import print_summary

        results = metrics.results
        medians = {tag: median for tag in SUMMARY_TAGS if (median := results.median(tag)) is not None}
        costs = self._memory_and_cost(results)
        summary = self.facts | {
            "steps": self.config.train.steps,
            LOSS: results.latest[LOSS],
            VALIDATION_LOSS: results.latest[VALIDATION_LOSS],
            "bigram_validation_loss": self.baseline,
            "first_step_s": self.first_step_s,
            "total_s": time.time() - self.began,
            "warmup_steps": self.config.metrics.warmup_steps,
            **medians,
            **results.spread(),
            **results.last(*OF_RECORDED, "comm/", "stragglers/", "moe/", "checkpoint/"),
            **costs,
        }
        write_summary(self.path, summary)
        for sink in self.sinks:
            sink.summary(summary)
        rows = self._rows(summary, medians, costs, empty=has_no_target(results.step))
        print_summary(rows, then=f"tensorboard --logdir {self.config.metrics.dir}")

    def _memory_and_cost(self, results: Results) -> dict[str, float]:
        """Values of memory, energy and cost. A tag of peak memory has its largest value."""
        values = results.last(MEMORY, "energy/", "cost/") | results.largest  # the last energy is the mean of the run
        for tag in values:
            if "usd" in tag and (median := results.median(tag)) is not None:
                values[tag] = median  # each step has its own cost, which depends on its speed
        return values

    def _rows(
        self, summary: dict[str, Any], medians: dict[str, float], costs: dict[str, float], *, empty: bool
    ) -> dict[str, str]:
        """The rows that the terminal shows. `empty`: the last step had no valid token."""
        from train.record.printed import NO_VALID_TOKEN

        precise = 10 if self.config.precision.value == "float64" else 6
        loss, validation = summary[LOSS], summary[VALIDATION_LOSS]
        rows = {
            "training loss, last step": NO_VALID_TOKEN if empty else f"{loss:.{precise}f}",
            "validation loss": NO_VALID_TOKEN if math.isnan(validation) else f"{validation:.{precise}f}",
        }
        if self.baseline is not None:
            rows["  of a byte-bigram model"] = f"{self.baseline:.{precise}f}"
        rows |= {tag: f"{value:,.1f}  (median)" for tag, value in medians.items()}
        for tag, value in costs.items():
            if tag.startswith(MEMORY):
                rows[f"{tag}, largest of the ranks"] = f"{value:.3f}"
            else:
                rows[tag] = f"{value:,.4g}"
        return rows | {"start to first step, s": f"{self.first_step_s:.1f}"}


def _but_for_disks(args: threading.ExceptHookArgs) -> None:
    """Print an error of a thread, unless a disk failed or the run's directory was removed: TensorBoard's thread gives
    that to the main thread too, which says it in words."""
    if not (isinstance(args.exc_value, OSError) and args.exc_value.errno in (*OF_DISKS, errno.ENOENT)):
        threading.__excepthook__(args)
