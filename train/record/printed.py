"""What a run prints: what it is, where its files are, how it may differ from one device; its progress; its summary."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.config.schema import Config
from train.data.corpus import Corpus
from train.measure.hardware import device_name
from train.measure.metrics import Sink
from train.measure.results import LOSS, RECORDED, VALIDATION_LOSS, Record, has_no_target
from train.ranks.distributed import Runtime
from train.record.drawing import draw_mesh

NUM_PLAIN_LINES = 10
NO_VALID_TOKEN = "no valid token"  # shown instead of a loss if there was nothing to predict


def opening(
    config: Config, corpus: Corpus, runtime: Runtime, degrees: dict[str, int], world_size: int, num_parameters: int
) -> str:
    """Layout and device, data, model, batch and precision. `num_parameters` counts the whole model, not the part of one
    rank."""
    train, training, held_out = config.train, len(corpus.training), len(corpus.validation)
    used = f"{device_name(runtime.device)}, {runtime.backend}, torch {torch.__version__}"
    tokens = train.global_batch_size * train.seq_len
    lines = [
        *([runtime.note] if runtime.note else []),
        f"strategy {config.strategy.name} on {world_size} process(es): {used}",
        draw_mesh(degrees),
        f"data {config.data.source.value}: {corpus.says}",
        f"  {training + held_out:,} tokens: {training:,} to train on, {held_out:,} held out",
        f"model {config.model.name}: {num_parameters:,} parameters, precision {config.precision.value}",
        f"batch: {train.global_batch_size:,} sequences of {train.seq_len:,} tokens, {tokens:,} tokens a step",
    ]
    if config.runtime.elastic:
        lines.append("elastic: if a rank is lost, the others go on without it until it is back")
    return "\n".join(lines)


def announcement(path: Path, facts: dict[str, Any]) -> str:
    """The run's directory, and the differences from one device that the strategy declares in advance."""
    lines = [f"run: {path}"]
    if facts["differs"]:
        lines.append(f"expected to differ from one device in {', '.join(facts['differs'])}")
    if facts["lossy"]:
        lines.append(facts["lossy"]["says"])
    return "\n".join(lines)


class Terminal(Sink):
    """A progress bar on a terminal; if the output is not a terminal, some lines."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.every = num_steps, max(num_steps // NUM_PLAIN_LINES, 1)
        self.console = Console()
        self.progress: Progress | None = None
        self.validation = ""
        if sys.stdout.isatty():
            text = TextColumn("{task.fields[loss]}  {task.fields[speed]} tokens/s{task.fields[validation]}")
            self.progress = Progress(
                BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text, console=self.console
            )
            self.task = self.progress.add_task("", total=num_steps, loss="loss -", speed="-", validation="")
            self.progress.start()

    def write(self, step: int, values: Record) -> None:
        if VALIDATION_LOSS in values:
            found = values[VALIDATION_LOSS]
            self.validation = f"  validation {NO_VALID_TOKEN if math.isnan(found) else f'loss {found:.4f}'}"
            if self.progress is None:
                print(f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}{self.validation}", flush=True)
            return
        if "perf/tokens_per_s" not in values:  # a step whose end was not measured, because a rank was lost
            return
        empty, speed = has_no_target(values), f"{values['perf/tokens_per_s']:,.0f}"
        loss = NO_VALID_TOKEN if empty else f"loss {values[LOSS]:.4f}"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, loss=loss, speed=speed, validation=self.validation)
        elif step == 1 or step % self.every == 0:
            norm, ms = values["train/grad_norm"], values["perf/step_ms"]
            width = len(str(self.num_steps))
            where = f"step {step:>{width}}/{self.num_steps}"
            recorded = "  (recorded, which slows it)" if RECORDED in values else ""
            print(f"{where}  {loss}  grad norm {norm:.3f}  {ms:.0f} ms  {speed} tokens/s{recorded}", flush=True)

    def summary(self, values: dict[str, Any]) -> None:
        self.close()  # the table follows

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def print_summary(rows: dict[str, str], *, then: str) -> None:
    """Print the table at the end of a run, and the command to type next."""
    table = Table(show_header=False, title="summary", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(then, flush=True)
