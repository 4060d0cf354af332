"""What a run writes beside its metrics: a directory with its config, a summary, and some lines on the terminal."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.config.schema import Config
from train.config.strategy import resolve_degrees
from train.config.world import World
from train.data.corpus import Corpus
from train.measure.metrics import Metrics, Sink, validation_due
from train.measure.results import LOSS, MEMORY, OF_RECORDED, VALID_TOKENS, VALIDATION_LOSS, Results, has_no_target
from train.ranks.distributed import Runtime
from train.ranks.elastic.carried import Carried
from train.ranks.elastic.generations import Generation
from train.record.opening import announcement, opening
from train.record.run_dir import environment, facts_of, open_run_dir, write_summary

SUMMARY_TAGS = ("perf/step_ms", "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/mfu_pct")


@dataclass
class Report:
    """The report of a run. Only rank 0 writes it; on the other ranks `path` is None."""

    config: Config
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    baseline: float | None = None
    results: Results | None = None  # of the steps that were written before
    owes_validation: bool = False  # the last step's validation loss was due, and is not written
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(
        cls, tree: DictConfig, corpus: Corpus, generation: Generation, carried: Carried, runtime: Runtime
    ) -> Report:
        """Print the first lines of the run, create its directory, and open its sinks. Other ranks than 0 do nothing.
        If the run has a directory, it goes on there."""
        config, world = generation.config, generation.origin
        if generation.world.rank > 0:
            return cls(config)
        if carried.run is not None:
            return cls._go_on(carried.run, config, tree, corpus, world, runtime, carried)
        from train.record.sinks import open_sinks

        degrees = resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        # printed before the text is hashed, because this takes time if the text is large
        print(opening(config, corpus, runtime, degrees, world.world_size), flush=True)
        path, facts = open_run_dir(config, tree, corpus, world, runtime, degrees)
        sinks = open_sinks(path, config, tree, facts, degrees, world.world_size)
        print(announcement(path, facts), flush=True)
        windows = config.train.eval_batches * config.train.global_batch_size
        baseline = corpus.bigram_loss(windows) if corpus.is_bytes else None
        return cls(config, path, facts, sinks, baseline)

    @classmethod
    def _go_on(
        cls,
        path: Path,
        config: Config,
        tree: DictConfig,
        corpus: Corpus,
        world: World,
        runtime: Runtime,
        carried: Carried,
    ) -> Report:
        """Go on with the report of a run whose last steps were made in another generation, perhaps by another rank 0.
        What that one had not written is written now. `world`: the one with which the run began."""
        from train.record.sinks import open_sinks

        degrees = resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        machine = environment(runtime.device, runtime.backend, world.world_size)
        facts = facts_of(config, corpus, runtime, degrees, machine)
        records = written(path)
        sinks = open_sinks(path, config, tree, facts, degrees, world.world_size, goes_on=True)
        windows, size = config.train.eval_batches * config.train.global_batch_size, config.train.global_batch_size
        baseline = corpus.bigram_loss(windows) if corpus.is_bytes else None
        results = Results.of((values for _, values in records), config.metrics.warmup_steps)
        last = max((step for step, _ in records), default=0)
        for step, figures in sorted(carried.figures.items()):
            if last < step <= carried.step:
                values = figures | ({} if corpus.any_target(step, size) else {LOSS: math.nan, VALID_TOKENS: 0.0})
                results.add(values)
                for sink in sinks:
                    sink.write(step, values)
        validated = any(step == carried.step and VALIDATION_LOSS in values for step, values in records)
        owes = carried.step > 0 and validation_due(config, carried.step) and not validated
        return cls(config, path, facts, sinks, baseline, results, owes)

    def finish(self, metrics: Metrics, first_step_s: float) -> None:
        """Write summary.json, pass the summary to the sinks, and print the table."""
        if self.path is None:
            return
        from train.record.sinks import print_summary

        results = metrics.results
        medians = {tag: median for tag in SUMMARY_TAGS if (median := results.median(tag)) is not None}
        costs = self._memory_and_cost(results)
        validation_loss = results.latest.get(VALIDATION_LOSS, math.nan)
        summary = self.facts | {
            "steps": self.config.train.steps,
            LOSS: results.latest[LOSS],
            VALIDATION_LOSS: validation_loss,
            "bigram_validation_loss": self.baseline,
            "first_step_s": first_step_s,
            "total_s": time.perf_counter() - self.started,
            "warmup_steps": self.config.metrics.warmup_steps,
            **medians,
            **results.spread(),
            **results.last(*OF_RECORDED, "comm/", "stragglers/", "moe/"),
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
        from train.record.sinks import NO_VALID_TOKEN

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
        return rows | {"start to first step, s": f"{summary['first_step_s']:.1f}"}


def written(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The records of metrics.jsonl, each with its step. A last line that a killed process left unfinished is removed
    from the file."""
    file = path / "metrics.jsonl"
    text = file.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(file, len(whole))
    records = [json.loads(line) for line in whole.splitlines()]
    return [(values.pop("step"), {k: v for k, v in values.items() if k != "time"}) for values in records]
