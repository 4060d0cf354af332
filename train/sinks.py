"""Where values go: a line-buffered JSON file, TensorBoard, and the reader's terminal. Only rank 0 makes these."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.metrics import Record

NUM_PLAIN_LINES = 10


class JsonLines:
    """One object a line, complete after every write: a killed run loses at most the step that was in flight."""

    def __init__(self, directory: Path) -> None:
        self.samples = directory / "samples"
        self.file = (directory / "metrics.jsonl").open("w", buffering=1)

    def write(self, step: int, values: Record) -> None:
        self.file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def sample(self, step: int, sample: dict[str, Any]) -> None:
        self.samples.mkdir(exist_ok=True)
        (self.samples / f"step-{step}.json").write_text(json.dumps(sample) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard:
    """The same tags, and texts: config, versions, mesh, corpus."""

    def __init__(self, directory: Path, texts: dict[str, str]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter

        self.summary = Summary
        self.writer = SummaryWriter(str(directory))
        for name, text in texts.items():
            self.writer.add_text(name, f"```\n{text}\n```", 0)

    def write(self, step: int, values: Record) -> None:
        # one event a step, not one a tag: 40 tags cost as much as one
        entries = [self.summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self.writer._get_file_writer().add_summary(self.summary(value=entries), step)
        self.writer.flush()

    def sample(self, step: int, sample: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        self.writer.close()


class Terminal:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps, self.every = num_steps, max(num_steps // NUM_PLAIN_LINES, 1)
        self.console = Console()
        self.progress: Progress | None = None
        self.validation = ""
        if sys.stdout.isatty():
            text = TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s{task.fields[validation]}")
            self.progress = Progress(
                BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), text, console=self.console
            )
            self.task = self.progress.add_task("", total=num_steps, loss="-", speed="-", validation="")
            self.progress.start()

    def write(self, step: int, values: Record) -> None:
        if "validation/loss" in values:
            self.validation = f"  validation loss {values['validation/loss']:.4f}"
            if self.progress is None:
                print(f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}{self.validation}", flush=True)
            return
        loss, speed = f"{values['train/loss']:.4f}", f"{values['perf/tokens_per_s']:,.0f}"
        if self.progress is not None:
            self.progress.update(self.task, completed=step, loss=loss, speed=speed, validation=self.validation)
        elif step == 1 or step % self.every == 0:
            norm, ms = values["train/grad_norm"], values["perf/step_ms"]
            width = len(str(self.num_steps))
            where = f"step {step:>{width}}/{self.num_steps}"
            print(f"{where}  loss {loss}  grad norm {norm:.3f}  {ms:.0f} ms  {speed} tokens/s", flush=True)

    def sample(self, step: int, sample: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()


def print_summary(rows: dict[str, str], *, then: str) -> None:
    """The table at the end of a run, and what to type next."""
    table = Table(show_header=False, title="summary", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(then, flush=True)
