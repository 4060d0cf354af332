"""What a run leaves behind beside its metrics: a directory with its config, a summary, a few lines on the terminal."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from train.board import hparams
from train.config import Config
from train.data import Corpus
from train.distributed import Runtime
from train.drawing import draw_mesh
from train.metrics import Metrics, Sink
from train.run_dir import environment, make_run_dir, write_summary
from train.strategies.base import resolve_degrees
from train.world import World

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
    def open(cls, config: Config, tree: DictConfig, corpus: Corpus, world: World, runtime: Runtime) -> Report:
        """Make the run's directory and its sinks, and say what is about to run."""
        if world.rank > 0:
            return cls(config)
        from train.sinks import JsonLines, TensorBoard, Terminal
        from train.trackers import open_trackers

        degrees = resolve_degrees(config.strategy.mesh_axes(), world.world_size)
        path = make_run_dir(config, tree, degrees, world.world_size)
        facts = {
            "strategy": config.strategy.name,
            "degrees": {axis: degrees[axis] for axis in config.strategy.mesh_axes()},
            "precision": config.precision.value,
            **environment(runtime.device, runtime.backend, world.world_size),
            "corpus_sha256": corpus.sha256,
            "differs": config.strategy.differs(),
        }
        sinks: list[Sink] = [JsonLines(path / "metrics.jsonl"), Terminal(config.train.steps)]
        drawing, flat = draw_mesh(degrees), hparams(config, world.world_size, facts["device"])
        if config.metrics.tensorboard:
            texts = {
                "config": OmegaConf.to_yaml(tree, resolve=True),
                "environment": "\n".join(f"{name}: {value}" for name, value in facts.items()),
                "mesh": drawing,
            }
            warmup_steps = config.metrics.warmup_steps
            sinks.append(TensorBoard(path, texts, flat, degrees=degrees, warmup_steps=warmup_steps))
        sinks += open_trackers(config, path.name, flat)
        if runtime.note:
            print(runtime.note)
        used = f"{facts['device']}, {runtime.backend}, torch {torch.__version__}"
        print(
            f"strategy {config.strategy.name} on {world.world_size} process(es): {used}\n{drawing}\nrun: {path}",
            flush=True,
        )
        if facts["differs"]:
            print(f"expected to differ from one device in {', '.join(facts['differs'])}", flush=True)
        windows = config.train.eval_batches * config.train.global_batch_size
        baseline = corpus.bigram_loss(windows) if corpus.is_bytes else None
        return cls(config, path, facts, sinks, baseline)

    def finish(self, metrics: Metrics, validation_loss: float) -> None:
        """Write summary.json, tell the sinks, close them and print the table."""
        if self.path is None:
            return
        from train.sinks import print_summary

        last = metrics.history[-1]
        medians = {tag: value for tag in SUMMARY_TAGS if (value := metrics.median(tag)) is not None}
        memory = {tag: value for tag, value in last.items() if tag.startswith("memory/")}
        peaks = {tag: max(r[tag] for r in metrics.history) for tag in memory if "peak" in tag}
        summary = self.facts | {
            "steps": self.config.train.steps,
            "train/loss": last["train/loss"],
            "validation/loss": validation_loss,
            "bigram_validation_loss": self.baseline,
            "first_step_s": self.first_step_s,
            "total_s": time.perf_counter() - self.started,
            "warmup_steps": self.config.metrics.warmup_steps,
            **medians,
            **(memory | peaks),
        }
        write_summary(self.path, summary)
        for sink in self.sinks:
            sink.summary(summary)
        metrics.close()
        precise = 10 if self.config.precision.value == "float64" else 6
        rows = {
            "training loss, last step": f"{last['train/loss']:.{precise}f}",
            "validation loss": f"{validation_loss:.{precise}f}",
        }
        if self.baseline is not None:
            rows["  of a byte-bigram model"] = f"{self.baseline:.{precise}f}"
        rows |= {tag: f"{value:,.1f}  (median)" for tag, value in medians.items()}
        rows |= {f"{tag}, largest of the ranks": f"{value:.3f}" for tag, value in (memory | peaks).items()}
        rows["start to first step, s"] = f"{self.first_step_s:.1f}"
        print_summary(rows, then=f"tensorboard --logdir {self.config.metrics.dir}")
