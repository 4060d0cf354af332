"""The programs that run on all hosts of an emulated cluster: the measurements, and the trainings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from launch.emulating.agents import Job
from launch.emulating.task import Point, Task

LATENCY, MEDIUM, LARGE = 4096, 2**19, 2**22  # bytes of the messages that are measured
LINK_SIZES = (LATENCY, MEDIUM, LARGE, 2**24)  # under links=true
OPS = "all_reduce,reduce_scatter,all_gather,all_to_all,send"
# In training, ranks compute between messages, so one of two is late, and gloo then sends in one direction after the
# other (IN_TURN). Ranks that only send may meet, and then seem twice as fast. So one rank is late here, by more than a
# notice needs to arrive (twice the link's delay).
LATE_MS = 2
BUDGET_S, COMPUTING_S = 300, 60  # for the messages of one speed; for the profile
COMPUTATION = "computation"  # the name of the profile


def messages(task: Task, out: Path, sizes: Sequence[int]) -> Job:
    """Messages of these sizes between all processes; rows as JSON in the file `out`."""
    late_ms = LATE_MS + math.ceil(2 * (task.cluster.delay_ms or 0.0))
    words = [f"sizes={','.join(map(str, sizes))}", f"ops={OPS}", "device=cpu", f"late_ms={late_ms}"]
    words += [f"budget_s={BUDGET_S}", f"out={out}"]
    return Job(tuple(words), _in_turn(task), "scripts/calibrating/links.py", join_s=task.join_s)


def computation(task: Task) -> Job:
    """The profile of the computation of the first run's model, with all processes at work."""
    config = task.points[0].plan.config
    train = config.train
    words = [f"model={config.model.name}", f"precision={config.precision.value}", "runtime.device=cpu"]
    sizes = ("seq_len", "micro_batch_size", "global_batch_size")
    words += [f"train.{key}={getattr(train, key)}" for key in sizes]
    words += [f"budget_s={COMPUTING_S}", f"profile={COMPUTATION}", f"folder={task.folder}"]
    return Job(tuple(words), _in_turn(task), "scripts/matmul.py", join_s=task.join_s)


def training(task: Task, point: Point, speed: float | None) -> Job:
    timeout_s = point.plan.config.runtime.timeout_s
    return Job(task.words(point, speed), point.hosts, timeout_s=timeout_s, join_s=task.join_s, fault=task.fault)


def links_of(task: Task, speed: float | None) -> tuple[Path, tuple[int, ...]]:
    """(The file for the messages at a speed, their sizes)."""
    # with several ranks on a host a message of two ranks may stay inside, so that it says nothing of the link
    needed = (LATENCY, MEDIUM) if task.cluster.per_node == 1 else (LATENCY,)
    return task.folder_of(speed) / "links.json", LINK_SIZES if task.links else needed


def unshaped_of(task: Task) -> tuple[Path, tuple[int, ...]]:
    return task.folder / "unshaped.json", (LATENCY, LARGE)


def _in_turn(task: Task) -> tuple[int, ...]:
    """The hosts of all ranks in torchrun's own order."""
    return tuple(rank // task.cluster.per_node for rank in range(task.cluster.nproc))
