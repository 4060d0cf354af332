"""What happens when memory runs out: one message says what fills the memory and what would help. Also snapshots of a
GPU's memory.

A snapshot is made by torch (`torch.cuda.memory`; private functions, torch 2.11 to 2.13). It is a pickle file for the
viewer at pytorch.org/memory_viz, which reads it in the browser. Open only snapshots that you made: a pickle can run
code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, Reported
from train.config.schema import ActivationCheckpointing, Config
from train.config.strategy import TrainStep
from train.measure.peak import storages
from train.measure.results import GiB
from train.strategies.deepspeed.strategy import DeepSpeed

MAX_EVENTS = 200_000
NO_MEMORY_ON_CPU = "can't allocate memory"


class OutOfMemory(Reported):
    """The device, or the host, has no memory left."""

    exit_code = EXIT_ENVIRONMENT
    of_one_rank = True


@dataclass
class Watched:
    """What is known about the run when memory runs out."""

    config: Config
    device: torch.device
    rank: int
    train_step: TrainStep | None = None
    run: Path | None = None  # its directory, the same on every rank

    def snapshot(self) -> Path | None:
        """Write a snapshot into the run's directory. Returns None if there is no such directory, or no GPU."""
        if self.run is None or self.device.type != "cuda":
            return None
        path = self.run / "memory" / f"rank-{self.rank}.pickle"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
        return path


@contextmanager
def explained(config: Config, device: torch.device, rank: int) -> Iterator[Watched]:
    """Turn torch's error into OutOfMemory, after a snapshot. Raises BadInput (exit code 3) if a snapshot is requested
    on a device that is not a CUDA device."""
    if config.metrics.memory_snapshot and device.type != "cuda":
        needs = f"metrics.memory_snapshot=true needs a CUDA device, but the run is on {device.type}"
        fix = "use metrics.memory_snapshot=false"
        raise BadInput(Problem("memory_snapshot", needs, fix, exit_code=EXIT_ENVIRONMENT))
    watched = Watched(config, device, rank)
    if config.metrics.memory_snapshot:
        torch.cuda.memory._record_memory_history(max_entries=MAX_EVENTS)
    try:
        yield watched
    except RuntimeError as error:  # its subclass torch.OutOfMemoryError on a GPU; a plain RuntimeError on a CPU
        if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY_ON_CPU not in str(error):
            raise
        raise OutOfMemory(message(watched, kinds(watched), watched.snapshot())) from None
    if config.metrics.memory_snapshot:
        watched.snapshot()


def kinds(watched: Watched) -> dict[str, int]:
    """Bytes by kind, the largest first. What the allocator holds beside the known tensors counts as activations and
    temporary."""
    device_type = watched.device.type
    held = {} if watched.train_step is None else watched.train_step.state_tensors()
    sizes = {name: sum(storages(tensors, device_type).values()) for name, tensors in held.items()}
    if device_type != "cpu":
        rest = torch.accelerator.memory_allocated() - sum(sizes.values())
        sizes["activations and temporary"] = max(rest, 0)
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def message(watched: Watched, sizes: dict[str, int], snapshot: Path | None) -> str:
    """One line that says what fills the memory, and names up to three changes that would help."""
    fills = ", ".join(f"{name} {size / GiB:.2f} GiB" for name, size in list(sizes.items())[:3])
    kept = f" (snapshot: {snapshot})" if snapshot else ""
    where = f"out of memory on rank {watched.rank} ({watched.device})"
    helps = remedies(watched.config, built=watched.train_step is not None)[:3]
    return f"{where}, which holds {fills or 'nothing yet'}: use {' or '.join(helps)}{kept}"


def remedies(config: Config, *, built: bool) -> list[str]:
    """Changes that need less memory, the smallest change first. Before the model is built, a smaller batch does not
    help."""
    train, axes = config.train, config.strategy.mesh_axes()
    found = []
    if not built:
        if "dp_shard" not in axes and "cp" not in axes:
            found.append("strategy=fsdp (on more processes)")
        return [*found, "more processes", "a smaller model", "a device with more memory"]
    if train.micro_batch_size > 1:
        found.append(f"train.micro_batch_size={train.micro_batch_size // 2}")
    if train.activation_checkpointing is not ActivationCheckpointing.full:
        found.append("train.activation_checkpointing=full")
    elif not (train.offload_activations or "pp" in axes or isinstance(config.strategy, DeepSpeed)):
        found.append("train.offload_activations=true")
    if not config.precision.casts:
        found.append("precision=bf16")
    if "dp_shard" not in axes and "cp" not in axes:
        found.append("strategy=fsdp (on more processes)")
    elif "tp" not in axes:
        found.append("strategy=fsdp_tp (on more processes)")
    return [*found, "more processes", f"train.seq_len={max(train.seq_len // 2, 1)}", "a smaller model"]
