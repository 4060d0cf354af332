"""The keys under `runtime` and `metrics`: the device of a run, and what it records."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from train.config.fields import MAX_STEPS, MAX_TIMEOUT_S, key, number


class Tracker(Enum):
    """Experiment trackers. The package and pip's extra have the same name."""

    mlflow = "mlflow"
    wandb = "wandb"
    trackio = "trackio"


@dataclass
class RuntimeConfig:
    device: str = key(
        "auto",
        "The type of device, for example cpu or cuda; auto uses the accelerator if there is one for each process and "
        "it can communicate, else the CPU.",
    )
    backend: str = key(
        "auto", "The backend of torch.distributed, for example gloo or nccl; auto uses the device's own, else gloo."
    )
    timeout_s: float = number(
        300.0,
        "A collective that takes longer than this many seconds ends the run with an error.",
        ge=1,
        le=MAX_TIMEOUT_S,
    )
    elastic: bool = key(
        False, "When a rank is killed, the others go on without it; it is started again and joins them later."
    )
    rejoin_every: int = number(
        10,
        "With elastic, ranks that are back join after a step that this number divides.",
        ge=1,
        le=MAX_STEPS,
    )


@dataclass
class MetricsConfig:
    dir: str = key("runs", "The folder in which each run gets a directory of its own; ~ is the home folder.")
    warmup_steps: int = number(
        5, "The number of first steps that the medians of the summary leave out.", ge=0, le=MAX_STEPS
    )
    tensorboard: bool = key(True, "TensorBoard's event file is written.")
    profile_every: int = number(
        500,
        "Step 10 and then every so many steps are recorded by the profiler; with 0 no step is.",
        ge=0,
        le=MAX_STEPS,
    )
    memory_snapshot: bool = key(
        False,
        "A snapshot of each GPU's allocator, with stacks, is written at the end of the run; after an out-of-memory "
        "error one is written in any case.",
    )
    trace: bool = key(False, "The recordings of recorded steps are kept, one file for each rank, for Perfetto.")
    trackers: list[Tracker] = key(
        list, "Experiment trackers that get the metrics in addition to TensorBoard, for example [mlflow]."
    )
