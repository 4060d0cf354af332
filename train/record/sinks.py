"""The destinations of values: a line-buffered JSON file and TensorBoard. printed.py has the terminal, and trackers.py
the trackers. Only rank 0 creates them."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from train.command import as_typed
from train.config import plain_json
from train.config.schema import Config
from train.measure.metrics import Sink
from train.measure.results import LOSS, RECORDED, VALIDATION_LOSS, Record, has_no_target
from train.record import board
from train.record.drawing import draw_mesh
from train.record.printed import Terminal
from train.record.run_files import write_whole
from train.record.tags import shown_as
from train.record.trackers import open_trackers


class JsonLines(Sink):
    """One JSON object per line, written at once, so that a killed run loses only the step that was going on.

    A run that goes on after step `after` keeps the lines up to this step, which `earlier` has, so that each step has
    one line. Samples of later steps are removed.
    """

    def __init__(self, directory: Path, after: int | None = None) -> None:
        self.directory, path = directory, directory / "metrics.jsonl"
        self.earlier: list[tuple[int, Record]] = []
        if after is not None:
            self.earlier = keep_lines(path, after)
            for sample in directory.glob("samples/step-*.json"):
                if int(re.sub(r"\D", "", sample.stem) or 0) > after:
                    sample.unlink()
        self.file = path.open("w" if after is None else "a", buffering=1)

    def write(self, step: int, values: Record) -> None:
        self.file.write(plain_json.dumps({"step": step, "time": time.time(), **values}) + "\n")

    def sample(self, step: int, record: dict[str, Any]) -> None:
        (self.directory / "samples").mkdir(exist_ok=True)
        write_whole(sample_file(self.directory, step), plain_json.dumps(record) + "\n")

    def saved(self) -> None:
        os.fsync(self.file.fileno())  # so that it has all steps of the checkpoint, even after a power loss

    def close(self) -> None:
        self.file.close()


def sample_file(directory: Path, step: int) -> Path:
    return directory / "samples" / f"step-{step}.json"


def keep_lines(path: Path, step: int) -> list[tuple[int, Record]]:
    """Remove the lines of later steps, and a line that was not finished. Returns the others, each as its step and its
    values."""
    kept, lines = [], []
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
                values = json.loads(line)
                at = values.pop("step")
                if at <= step:
                    kept.append((at, {t: math.nan if v is None else v for t, v in values.items() if t != "time"}))
                    lines.append(line)
    write_whole(path, "".join(lines))
    return kept


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
        after: int | None = None,
        earlier: Sequence[tuple[int, Record]] = (),
    ) -> None:
        """`after`: the step after which the run goes on: TensorBoard shows no later step of the earlier files.
        `earlier`: the records up to this one, each with its step. Those of the last step are written again, because a
        process that was killed may have written them to metrics.jsonl only."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import SummaryWriter

        self.proto, self.degrees = Summary, degrees
        self.results_so_far, self.step = board.ResultsSoFar(warmup_steps), 0
        self.results: Record = {}  # the results that were written last
        self.sampled = self.num_samples = 0  # the last sampled step, and the number of samples
        self.undrawn: tuple[int, dict[str, Any]] | None = None  # the last sample, if it is not drawn yet
        last = max((step for step, _ in earlier), default=(after or 0) + 1)
        wait_for_a_later_name(directory)
        self.writer = SummaryWriter(str(directory), purge_step=None if after is None else last)
        if after is not None:
            for step, values in earlier:
                if RECORDED in values:
                    self.sampled = min(step, last - 1)
                if step == last:
                    self.write(step, values)
                else:
                    self.results |= self.results_so_far.add(values)
            self.step = after
            with suppress(FileNotFoundError):
                self.sample(last, json.loads(sample_file(directory, last).read_text()))
            return
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


def wait_for_a_later_name(directory: Path) -> None:
    """Return in a later second than that in which the newest event file was made, after a second at most. TensorBoard
    reads the files by name, which begins with this second; in the same second the process's number would decide."""
    newest = max((int(path.name.split(".")[3]) for path in directory.glob("events.out.tfevents.*")), default=0)
    time.sleep(min(max(newest + 1 - time.time(), 0.0), 1.0))


def open_sinks(
    path: Path,
    config: Config,
    tree: DictConfig,
    facts: dict[str, Any],
    degrees: dict[str, int],
    world_size: int,
    after: int | None = None,
) -> tuple[list[Sink], list[tuple[int, Record]]]:
    """(The sinks that the config requests, in the run's directory `path`; the records of earlier steps, if the run goes
    on after step `after`.) Raises BadInput if a tracker cannot start."""
    lines = JsonLines(path, after)
    sinks: list[Sink] = [lines, Terminal(config.train.steps)]
    flat = board.hparams(config, world_size, facts["device"])
    if config.metrics.tensorboard:
        texts = {
            "config": as_typed.yaml(tree),
            "environment": "\n".join(f"{name}: {value}" for name, value in facts.items()),
            "mesh": draw_mesh(degrees),
        }
        warmup = config.metrics.warmup_steps
        earlier = lines.earlier
        board_sink = TensorBoard(path, texts, flat, degrees=degrees, warmup_steps=warmup, after=after, earlier=earlier)
        sinks.append(board_sink)
    return [*sinks, *open_trackers(config, path.name, flat)], lines.earlier
