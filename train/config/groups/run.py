"""The keys under `runtime`, `metrics` and `checkpoint`: the device of a run, what it records, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from train.config.fields import MAX_STEPS, MAX_TIMEOUT_S, key, number


class Tracker(Enum):
    """Experiment trackers. The package and pip's extra have the same name."""

    mlflow = "mlflow"
    wandb = "wandb"
    trackio = "trackio"


# `async` is a keyword of Python, so that a class statement cannot have such a member.
SaveMode = Enum("SaveMode", {"sync": "sync", "async": "async"})


AUTO, NEVER = "auto", "never"  # of checkpoint.resume


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
        False,
        "When a rank is killed, the others go on without it; it is started again, and joins them after the next step "
        "that is saved (the next step, if none is saved).",
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


@dataclass
class CheckpointConfig:
    every: int = number(
        500,
        "A checkpoint is saved every so many steps, and after the last step; with 0 none is saved.",
        ge=0,
        le=MAX_STEPS,
    )
    keep: int = number(2, "The number of newest checkpoints that are kept; older ones are removed.", ge=2, le=MAX_STEPS)
    mode: SaveMode = key(
        SaveMode.sync,
        "Whether training waits until a checkpoint is on the disk (sync), or only until it is copied to the host's "
        "memory (async).",
    )
    resume: str = key(
        AUTO,
        "auto continues the run of the same command line that was cut off; never starts a new run; the directory of a "
        "run, or of one of its checkpoints, starts a new run from that state, which the same line then continues.",
    )
    weights: str | None = key(
        None,
        "The initial parameters, instead of drawn ones: the directory of a run, one of its checkpoints, or a folder "
        "with weights.safetensors; the run starts at step 1 with a new optimiser.",
    )

    def continues(self, run: object) -> str:
        """What continues this run after it was cut off, as a sentence; empty if the run saves nothing."""
        if not self.every:
            return ""
        if self.resume == NEVER:
            return f"checkpoint.resume={run} starts a new run from it"
        return "the same command line continues it"
