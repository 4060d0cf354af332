"""Submit a run to Slurm: python -m launch.slurm nodes=2 gpus_per_node=8 strategy=3d

Checks the words, and then submits launch/slurm.sbatch with them. The script starts launch.node on every machine, saves
and queues the job again before its time is up, and goes on from the newest checkpoint. Several values, as
strategy=dp,fsdp (Hydra's grammar, as in launch.sweep), become an array of jobs. dry_run=true prints the line of sbatch,
and the torchrun lines that the machines will run.

Takes every override that train/main.py takes, and the options that --help shows. nproc is the number of processes of
all machines together; without it, there is one for each GPU. The job gets this environment, and runs in this folder,
which all machines must share.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from launch.cluster.size import Size, has_nproc
from launch.cluster.slurm_job import Job
from launch.describe.nodes import warnings
from launch.explain import problems
from launch.start.device import laid_out
from launch.sweeping.grid import Checked, InvalidPoints, Point, expand
from train.command import cli, options
from train.command.launching import nodes
from train.command.planning import auto
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plan import Plan
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.world import World


def main(argv: Sequence[str]) -> int:
    """Submit the job, and return the exit code."""
    with reported_once(World.single()):
        words = list(argv)
        dry_run = nodes.DRY_RUN.pop(words)
        job = read(words)
        if dry_run:
            print("\n".join(job.shown()), flush=True)
            return 0
        if shutil.which("sbatch") is None:
            fix = "run this where Slurm's commands are installed, or see with dry_run=true what it would run"
            raise BadInput(Problem("slurm", "sbatch is not found", fix, exit_code=EXIT_ENVIRONMENT))
        env = os.environ | job.environment
        done = subprocess.run(job.line, env=env, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            fix = 'options of sbatch are given as sbatch="--partition=NAME --time=60"'
            raise BadInput(Problem("slurm", f"sbatch did not take the job ({said})", fix, exit_code=EXIT_ENVIRONMENT))
    return 0


def read(words: list[str]) -> Job:
    """The job of a command line, checked. Raises BadInput."""
    count, gpus = nodes.NODES.pop(words), nodes.GPUS_PER_NODE.pop(words)
    extra, skip = nodes.SBATCH.pop(words), options.SKIP_INVALID.pop(words)
    waits = tuple(word for word in words if word.startswith(f"{nodes.JOIN_S.name}="))
    nodes.JOIN_S.pop(words)
    parser = cli.parser(nodes.SLURM, __doc__ or "")
    args = parser.parse_intermixed_args(words)
    given = [] if has_nproc(args.overrides) else [f"{options.NPROC.name}={count * max(gpus, 1)}"]
    points = expand([*given, *args.overrides])
    if args.help:
        cli.show_help(parser, [auto.stood_in(point.overrides) for point in points])
    flags = [*(["--cfg", args.cfg] if args.cfg else []), *(["--multirun"] if args.multirun else [])]
    checked = [_checked(parser, point, count, flags) for point in points]
    valid = [one for one in checked if not one.problems]
    if len(points) == 1 and not valid:
        raise BadInput(*checked[0].problems)
    if not valid or (len(valid) < len(checked) and not skip):
        raise InvalidPoints(checked, "global")
    said = dict.fromkeys(line for one in valid if one.plan for line in warnings(one.plan, count))
    print("".join(f"{line}\n" for line in said), end="", file=sys.stderr, flush=True)
    return Job(count, gpus, [one.point for one in valid], extra, waits)


def _checked(parser: ArgumentParser, point: Point, count: int, flags: Sequence[str]) -> Checked:
    """A point with the problems that can be seen without its machines."""
    try:
        Size(count, point.nproc)
        config = cli.parse(parser, [*laid_out(point.overrides, point.nproc, kept=1)[0], *flags])[0]
    except BadInput as error:
        return Checked(point, None, 0, error.problems)
    return Checked(point, Plan(config, point.nproc), 0, tuple(problems(config, point.nproc)))


if __name__ == "__main__":
    lasting()
    sys.exit(main(sys.argv[1:]))
