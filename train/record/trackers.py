"""Experiment trackers beside TensorBoard: metrics.trackers=[mlflow]. Each is imported only when it is named.

They get the finite values of every step except `memory_by_rank/`, the flat hyperparameters of board.py, and at the end
the numbers of the summary. Their own settings decide where they write: MLFLOW_TRACKING_URI, WANDB_MODE=offline,
TRACKIO_DIR and the like. If a tracker fails during a run, one line says so and it is not used any more: a lost server
does not stop the training.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config, Tracker
from train.measure.results import BY_RANK, Record
from train.record.board import Hparams

PROJECT, MAX_MESSAGE = "strategy-lab", 160


class TrackerSink(ABC):
    """The sink of one tracker. A subclass opens a run with the given name, logs numbers to it, and ends it."""

    name: ClassVar[str]

    def __init__(self, run: str, hparams: Hparams) -> None:
        self.failed = self.completed = False
        self.open(run, hparams)

    @abstractmethod
    def open(self, run: str, hparams: Hparams) -> None: ...

    @abstractmethod
    def log(self, step: int, values: Record) -> None: ...

    @abstractmethod
    def log_summary(self, values: Record) -> None: ...

    @abstractmethod
    def end(self) -> None:
        """End the tracker's run. `self.completed`: whether the training finished."""

    def write(self, step: int, values: Record) -> None:
        shown = {tag: v for tag, v in values.items() if math.isfinite(v) and not tag.startswith(BY_RANK)}
        self._try(self.log, step, shown)

    def sample(self, step: int, record: dict[str, Any]) -> None:
        return None

    def saved(self) -> None:
        return None

    def summary(self, values: dict[str, Any]) -> None:
        self.completed = True
        self._try(
            self.log_summary, {tag: v for tag, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        )

    def close(self) -> None:
        self._try(self.end)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self.failed:
            return
        try:
            call(*arguments)
        except Exception as error:  # any exception is possible, because it depends on networks and servers
            self.failed = True
            print(f"{self.name} failed and is not used any more: {_line(error)}", file=sys.stderr, flush=True)


class Mlflow(TrackerSink):
    name = "mlflow"

    def open(self, run: str, hparams: Hparams) -> None:
        import mlflow

        self.mlflow, self.client = mlflow, mlflow.MlflowClient()
        experiment = mlflow.set_experiment(PROJECT)
        self.run_id = self.client.create_run(experiment.experiment_id, run_name=run).info.run_id
        parameters = [mlflow.entities.Param(key, str(value)) for key, value in hparams.items()]
        self.client.log_batch(self.run_id, params=parameters)

    def log(self, step: int, values: Record) -> None:
        now = int(time.time() * 1e3)
        metrics = [self.mlflow.entities.Metric(tag, value, now, step) for tag, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics, synchronous=False)  # so the loop does not wait for a server

    def log_summary(self, values: Record) -> None:
        self.log(0, {f"summary/{tag}": value for tag, value in values.items()})

    def end(self) -> None:
        self.mlflow.flush_async_logging()
        self.client.set_terminated(self.run_id, status="FINISHED" if self.completed else "FAILED")


class Wandb(TrackerSink):
    name = "wandb"

    def open(self, run: str, hparams: Hparams) -> None:
        import wandb

        quiet = wandb.Settings(console="off", silent=True)
        self.run = wandb.init(project=PROJECT, name=run, config=dict(hparams), settings=quiet)

    def log(self, step: int, values: Record) -> None:
        self.run.log(values, step=step)

    def log_summary(self, values: Record) -> None:
        self.run.summary.update({f"summary/{tag}": value for tag, value in values.items()})

    def end(self) -> None:
        self.run.finish(exit_code=0 if self.completed else 1)


class Trackio(TrackerSink):
    name = "trackio"

    def open(self, run: str, hparams: Hparams) -> None:
        import trackio

        self.run = trackio.init(project=PROJECT, name=run, config=dict(hparams))

    def log(self, step: int, values: Record) -> None:
        self.run.log(values, step=step)

    def log_summary(self, values: Record) -> None:
        self.run.log({f"summary/{tag}": value for tag, value in values.items()})

    def end(self) -> None:
        self.run.finish()


SINKS: dict[Tracker, type[TrackerSink]] = {Tracker.mlflow: Mlflow, Tracker.wandb: Wandb, Tracker.trackio: Trackio}


def open_trackers(config: Config, run: str, hparams: Hparams) -> list[TrackerSink]:
    """The trackers that the config names. Raises BadInput (exit code 3) if one cannot start."""
    sinks = []
    for tracker in dict.fromkeys(config.metrics.trackers):
        try:
            sinks.append(SINKS[tracker](run, hparams))
        except Exception as error:
            message = f"metrics.trackers=[{tracker.value}] cannot start ({_line(error)})"
            fix = f"set {tracker.value} up (an account, a server or a folder), or use metrics.trackers=[]"
            raise BadInput(Problem("tracker", message, fix, exit_code=EXIT_ENVIRONMENT)) from error
    return sinks


def _line(error: Exception) -> str:
    """The start of the error's first line, because some of these messages are very long."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= MAX_MESSAGE else f"{line[:MAX_MESSAGE]} …"
