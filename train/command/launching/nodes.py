"""The options of launch.node, launch.slurm and launch.kubernetes. Torch is not imported."""

from __future__ import annotations

import re
import shlex
from typing import Any

from train.command.option import TRUE_OR_FALSE, Option, count, name, one_of, positive, text

ON_NODE, SLURM = "python -m launch.node", "python -m launch.slurm"
KUBERNETES, NETLAB = "python -m launch.kubernetes", "python -m launch.netlab"
MOST_NODES = 16_384
MOST_GPUS = 64


def address(text: str) -> tuple[str, int] | None:
    """The host and the port of `10.0.0.1:29500` or `[fe80::1]:29500`."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9][A-Za-z0-9._-]{0,252})):([1-9][0-9]{0,4})", text)
    return (found[1] or found[2], int(found[3])) if found and int(found[3]) < 2**16 else None


def words(line: str) -> tuple[str, ...] | None:
    """The words of a line, as a shell splits it."""
    try:
        found = tuple(shlex.split(line))
    except ValueError:
        return None
    return found if text(line) and found and found[0].startswith("-") else None


def dns_name(text: str) -> str | None:
    """A name that Kubernetes takes for a Job, with room for what it adds to the names of pods."""
    return text if re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", text) else None


NODES: Option[int] = Option(
    "nodes",
    1,
    ("python -m launch.explain", ON_NODE, SLURM, KUBERNETES, NETLAB),
    *positive(MOST_NODES),
    example="2",
    help="The number of machines, which share the processes of nproc equally; launch.netlab emulates 2 of them "
    "if it is not given.",
)
NODE: Option[int] = Option(
    "node",
    0,
    (ON_NODE,),
    *count(MOST_NODES),
    example="1",
    help="The number of this machine, from 0 on. Ranks are numbered from machine to machine.",
)
HEAD: Option[tuple[str, int] | None] = Option(
    "head",
    None,
    (ON_NODE,),
    "HOST:PORT",
    address,
    example="10.0.0.1:29500",
    help="An address of machine 0 at which the others reach it, and a free port there: the same on every machine.",
    unset="needed with several machines",
)
JOIN_S: Option[int] = Option(
    "join_s",
    60,
    (ON_NODE, SLURM, KUBERNETES, NETLAB),
    *positive(86_400),
    example="300",
    help="How long machines wait for each other at the start, in seconds.",
)
LOGS: Option[str | None] = Option(
    "logs",
    None,
    (ON_NODE,),
    "a path",
    text,
    example="logs",
    help="A folder in which each rank has its output, as rank-3.out and rank-3.err; it is shown as well.",
    unset="none",
)
DRY_RUN: Option[bool] = Option(
    "dry_run",
    False,
    ("python -m launch.local", "python -m launch.sweep", ON_NODE, SLURM, KUBERNETES, NETLAB),
    *TRUE_OR_FALSE,
    example="true",
    help="Print what would be run, and run nothing.",
)
GPUS_PER_NODE: Option[int] = Option(
    "gpus_per_node",
    0,
    (SLURM, KUBERNETES),
    *count(MOST_GPUS),
    example="8",
    help="The GPUs of each machine, one for each process; 0 for machines without.",
)
SBATCH: Option[tuple[str, ...]] = Option(
    "sbatch",
    (),
    (SLURM,),
    "options of sbatch, in one word, of which the first begins with a dash",
    words,
    example="--hold",
    help='Further options of sbatch: "sbatch=--time=60 --partition=gpu". They take the place of the script\'s own.',
    unset="those of the script",
)
FORM: Option[str] = Option(
    "form",
    "trainjob",
    (KUBERNETES,),
    *one_of("trainjob", "job"),
    example="job",
    help="trainjob: a TrainJob of Kubeflow Trainer v2. job: an indexed Job and a headless Service, which need nothing "
    "but Kubernetes itself.",
)
IMAGE: Option[str] = Option(
    "image",
    "strategy-lab:cuda",
    (KUBERNETES,),
    "the name of an image",
    text,
    example="registry.example/strategy-lab:cuda",
    help="The image of the containers, as launch/Dockerfile builds it.",
)
JOB_NAME: Option[str] = Option(
    "job_name",
    "strategy-lab",
    (KUBERNETES,),
    "small letters, digits and -, at most 40",
    dns_name,
    example="first-run",
    help="The name of the TrainJob, or of the Job and its Service.",
)
CLAIM: Option[str | None] = Option(
    "claim",
    None,
    (KUBERNETES,),
    "the name of a PersistentVolumeClaim",
    name,
    example="runs",
    help="The volume on which runs and checkpoints are kept. All pods write to it, so it must be ReadWriteMany if "
    "there are several.",
    unset="none: runs are lost with their pods",
)
OPTIONS: tuple[Option[Any], ...] = (
    NODES,
    NODE,
    HEAD,
    JOIN_S,
    LOGS,
    DRY_RUN,
    GPUS_PER_NODE,
    SBATCH,
    FORM,
    IMAGE,
    JOB_NAME,
    CLAIM,
)
