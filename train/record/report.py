"""What a run leaves behind beside its metrics: a directory with its config, a summary, a few lines on the terminal."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.command import as_typed
from train.config.schema import Config
from train.config.strategy import resolve_degrees
from train.config.world import World
from train.data.corpus import Corpus
from train.measure.energy import open_meter
from train.measure.history import History
from train.measure.metrics import Metrics, Sink
from train.measure.quantiles import median_interval, quantile
from train.ranks.distributed import Runtime
from train.record.board import hparams
from train.record.drawing import draw_mesh
from train.record.opening import opening
from train.record.run_dir import command, environment, expected, make_run_dir, work_hash, write_summary, write_work


def spread(metrics: Metrics) -> dict[str, float]:
    """How steady the measured steps were: percentiles of their time, and a 95 % interval of the median throughput,
    which six steps give at the least."""
    times, speeds = metrics.history.measured("perf/step_ms"), metrics.history.measured("perf/tokens_per_s")
    low, high = median_interval(speeds)
    figures = {
        "measured_steps": len(times.ranked()),
        "perf/step_ms_p50": quantile(times, 0.5),
        "perf/step_ms_p95": quantile(times, 0.95),
        "perf/tokens_per_s_ci95_low": low,
        "perf/tokens_per_s_ci95_high": high,
    }
    return {name: value for name, value in figures.items() if value is not None}


SUMMARY_TAGS = ("perf/step_ms", "perf/tokens_per_s", "perf/tokens_per_s_per_device", "perf/mfu_pct")


@dataclass
class Report:
    """Rank 0's; on the other ranks `path` is None and nothing is written."""

    config: Config
    path: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    sinks: list[Sink] = field(default_factory=list)
    baseline: float | None = None
    first_step_s: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(
        cls, config: Config, tree: DictConfig, corpus: Corpus, world: World, runtime: Runtime, num_parameters: int
    ) -> Report:
        """Make the run's directory and its sinks, and say what is about to run."""
        if world.rank > 0:
            return cls(config)
        from train.record.sinks import JsonLines, TensorBoard, Terminal
        from train.record.trackers import open_trackers

        degrees = resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        # said before the text is hashed, which takes a while if it is large
        print(opening(config, corpus, runtime, degrees, world.world_size, num_parameters), flush=True)
        path = make_run_dir(config, tree, degrees, world.world_size, world.run_file)
        machine = environment(runtime.device, runtime.backend, world.world_size)
        facts = {
            "strategy": config.strategy.name,
            "degrees": {axis: degrees[axis] for axis in config.strategy.mesh_axes()},
            "precision": config.precision.value,
            **machine,
            "corpus_sha256": corpus.sha256,
            "work_hash": work_hash(config, corpus.sha256),
            **expected(config.strategy),
            "energy_sensor": open_meter(runtime.device).note,
        }
        size = {"tokens": len(corpus.training) + len(corpus.validation)}
        typed = as_typed.from_environment(tree)
        # machine has the world's size
        write_work(path, config, corpus.sha256, facts["degrees"], typed, **machine, **size, command=command(world))
        sinks: list[Sink] = [JsonLines(path), Terminal(config.train.steps)]
        flat = hparams(config, world.world_size, facts["device"])
        if config.metrics.tensorboard:
            texts = {
                "config": as_typed.yaml(tree),
                "environment": "\n".join(f"{name}: {value}" for name, value in facts.items()),
                "mesh": draw_mesh(degrees),
            }
            warmup_steps = config.metrics.warmup_steps
            sinks.append(TensorBoard(path, texts, flat, degrees=degrees, warmup_steps=warmup_steps))
        sinks += open_trackers(config, path.name, flat)
        print(f"run: {path}", flush=True)
        if facts["differs"]:
            print(f"expected to differ from one device in {', '.join(facts['differs'])}", flush=True)
        if facts["lossy"]:
            print(facts["lossy"]["says"], flush=True)
        windows = config.train.eval_batches * config.train.global_batch_size
        baseline = corpus.bigram_loss(windows) if corpus.is_bytes else None
        return cls(config, path, facts, sinks, baseline)

    def finish(self, metrics: Metrics, validation_loss: float) -> None:
        """Write summary.json, tell the sinks and print the table."""
        if self.path is None:
            return
        from train.record.sinks import print_summary

        history = metrics.history
        medians = {tag: m for tag in SUMMARY_TAGS if (m := quantile(history.measured(tag), 0.5)) is not None}
        held = self._held(history)
        summary = self.facts | {
            "steps": self.config.train.steps,
            "train/loss": history.latest["train/loss"],
            "validation/loss": validation_loss,
            "bigram_validation_loss": self.baseline,
            "first_step_s": self.first_step_s,
            "total_s": time.perf_counter() - self.started,
            "warmup_steps": self.config.metrics.warmup_steps,
            **medians,
            **spread(metrics),
            **history.last("time/", "pipeline/", "memory_at_peak/", "comm/", "stragglers/", "moe/"),
            **held,
        }
        write_summary(self.path, summary)
        for sink in self.sinks:
            sink.summary(summary)
        rows = self._rows(summary, medians, held, empty=history.step.get("train/valid_tokens") == 0)
        print_summary(rows, then=f"tensorboard --logdir {self.config.metrics.dir}")

    def _held(self, history: History) -> dict[str, float]:
        """Memory, at its peak where the tag is one, and energy and money."""
        values = history.last("memory/", "energy/", "cost/") | history.largest  # energy: means so far
        for tag in values:
            if "usd" in tag and (median := quantile(history.measured(tag), 0.5)) is not None:
                values[tag] = median  # follows from a step's own speed
        return values

    def _rows(
        self, summary: dict[str, Any], medians: dict[str, float], held: dict[str, float], *, empty: bool
    ) -> dict[str, str]:
        """What the terminal shows. `empty`: the last step had no valid token."""
        from train.record.sinks import NO_VALID_TOKEN

        precise = 10 if self.config.precision.value == "float64" else 6
        loss, validation = summary["train/loss"], summary["validation/loss"]
        rows = {
            "training loss, last step": NO_VALID_TOKEN if empty else f"{loss:.{precise}f}",
            "validation loss": NO_VALID_TOKEN if math.isnan(validation) else f"{validation:.{precise}f}",
        }
        if self.baseline is not None:
            rows["  of a byte-bigram model"] = f"{self.baseline:.{precise}f}"
        rows |= {tag: f"{value:,.1f}  (median)" for tag, value in medians.items()}
        for tag, value in held.items():
            if tag.startswith("memory/"):
                rows[f"{tag}, largest of the ranks"] = f"{value:.3f}"
            else:
                rows[tag] = f"{value:,.4g}"
        return rows | {"start to first step, s": f"{self.first_step_s:.1f}"}
