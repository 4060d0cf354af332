"""The destinations of values: a line-buffered JSON file, TensorBoard, and the terminal. Only rank 0 creates them."""

from __future__ import annotations

import math
import re
import sys
import time
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from train.command import as_typed
from train.config import plain_json
from train.config.schema import Config
from train.measure.metrics import Sink
from train.measure.results import LOSS, RECORDED, VALIDATION_LOSS, Record, has_no_target
from train.record import board
from train.record.drawing import draw_mesh
from train.record.run_files import write_whole
from train.record.tags import shown_as
from train.record.trackers import open_trackers

NUM_PLAIN_LINES = 10
NO_VALID_TOKEN = "no valid token"  # shown instead of a loss if there was nothing to predict


class JsonLines(Sink):
    """One JSON object per line, written at once, so that a killed run loses only the step that was going on."""

    def __init__(self, directory: Path, *, goes_on: bool = False) -> None:
        """`goes_on`: the lines that are there stay."""
        self.samples = directory / "samples"
        self.file = (directory / "metrics.jsonl").open("a" if goes_on else "w", buffering=1)

    def write(self, step: int, values: Record) -> None:
        self.file.write(plain_json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def sample(self, step: int, record: dict[str, Any]) -> None:
        self.samples.mkdir(exist_ok=True)
        write_whole(self.samples / f"step-{step}.json", plain_json.dumps(record) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoard(Sink):
    """The same values, under the tags of tags.py, with texts (config, versions, mesh), hyperparameters, results, charts
    and pictures. No tag gets two values at the same step."""

    def __init__(
        self,
        directory: Path,
        texts: dict[str, str],
        hparams: board.Hparams | None = None,
        *,
        degrees: dict[str, int] | None = None,
        warmup_steps: int = 0,
    ) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.proto, self.degrees = Summary, degrees
        self.results_so_far, self.step = board.ResultsSoFar(warmup_steps), 0
        self.results: Record = {}  # the results that were written last
        self.sampled = self.num_samples = 0  # the last sampled step, and the number of samples
        self.undrawn: tuple[int, dict[str, Any]] | None = None  # the last sample, if it is not drawn yet
        self.writer = SummaryWriter(str(directory))
        for name, text in texts.items():
            self.writer.add_text(name, f"```\n{text}\n```", 0)
        self._add(board.start_summary(hparams or {}), 0)

    def write(self, step: int, values: Record) -> None:
        # one event for all tags of a step: so 40 tags cost as little as one
        if has_no_target(values):
            values = {tag: value for tag, value in values.items() if tag != LOSS}
        self.step, results = step, self.results_so_far.add(values)
        validates = VALIDATION_LOSS in values  # this record follows that of the step, which had the other results
        written = {tag: value for tag, value in results.items() if (tag == board.RESULT_OF_VALIDATION) == validates}
        self.results |= written
        if RECORDED in values:
            *earlier, _ = board.steps_of_sample(self.sampled, step)
            self.sampled = step
            shown = {tag: value for tag, value in values.items() if re.match(board.OF_SAMPLES, tag)}
            for before in earlier:
                self._add_scalars(shown, before)
        self._add_scalars(values | written, step)

    def sample(self, step: int, record: dict[str, Any]) -> None:
        self.num_samples += 1
        if self.num_samples & (self.num_samples - 1):  # drawing is slow: only the 1st, 2nd, 4th, 8th … and the last
            self.undrawn = (step, record)
        else:
            self.undrawn = None
            self._draw(step, record)

    def summary(self, values: dict[str, Any]) -> None:
        if self.undrawn is not None:
            self._draw(*self.undrawn)
        final = self.results_so_far.results(values)
        self._add_scalars({tag: value for tag, value in final.items() if self.results.get(tag) != value}, self.step)
        self._add(board.end_summary(), self.step)

    def close(self) -> None:
        self.writer.close()

    def _draw(self, step: int, record: dict[str, Any]) -> None:
        if find_spec("matplotlib") is None:  # the extra `plot`
            return
        from train.record.pictures import draw_sample

        images = []
        for tag, figure in draw_sample(record, self.degrees).items():
            figure.savefig(png := BytesIO(), format="png")
            width, height = figure.canvas.get_width_height()
            image = self.proto.Image(width=width, height=height, encoded_image_string=png.getvalue())
            images.append(self.proto.Value(tag=tag, image=image))
        self._add(self.proto(value=images), step)

    def _add_scalars(self, values: Record, step: int) -> None:
        shown = [self.proto.Value(tag=shown_as(tag), simple_value=value) for tag, value in values.items()]
        self._add(self.proto(value=shown), step)

    def _add(self, summary: Any, step: int) -> None:
        """Write it at once, because a killed process loses what is still queued."""
        self.writer._get_file_writer().add_summary(summary, step)
        self.writer.flush()


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
        if "perf/tokens_per_s" not in values:  # the step of a generation that was over before it was logged
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


def open_sinks(
    path: Path,
    config: Config,
    tree: DictConfig,
    facts: dict[str, Any],
    degrees: dict[str, int],
    world_size: int,
    *,
    goes_on: bool = False,
) -> list[Sink]:
    """The sinks that the config requests, in the run's directory `path`. `goes_on`: the run has steps there already.
    Raises BadInput if a tracker cannot start."""
    sinks: list[Sink] = [JsonLines(path, goes_on=goes_on), Terminal(config.train.steps)]
    flat = board.hparams(config, world_size, facts["device"])
    if config.metrics.tensorboard:
        texts = {
            "config": as_typed.yaml(tree),
            "environment": "\n".join(f"{name}: {value}" for name, value in facts.items()),
            "mesh": draw_mesh(degrees),
        }
        sinks.append(TensorBoard(path, texts, flat, degrees=degrees, warmup_steps=config.metrics.warmup_steps))
    return [*sinks, *open_trackers(config, path.name, flat)]


def print_summary(rows: dict[str, str], *, then: str) -> None:
    """Print the table at the end of a run, and the command to type next."""
    table = Table(show_header=False, title="summary", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(then, flush=True)
