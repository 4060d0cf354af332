"""Check a run, print its torchrun command and start it: python -m launch.local nproc=4 strategy=tp

Takes every override that train/main.py takes, and the options that --help shows. If the command line, the data or the
machine cannot do what is asked, then nothing is started and no folder is made: the exit code is 2 or 3. Otherwise it is
the exit code of the ranks.
"""

from __future__ import annotations

import errno
import os
import shlex
import socket
import sys
from pathlib import Path

from launch.describe.memory import check_memory
from launch.start.device import laid_out
from launch.start.environment import local_environment, torchrun_line
from launch.start.folder import obstacle
from launch.start.foreground import run_here
from train.command import cli, options
from train.command.launching import nodes
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.command.validate import completed
from train.config.plan import Plan
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, unusable
from train.config.schema import Config
from train.config.world import World
from train.data.corpus import load_corpus


def main() -> None:
    leave_on_interrupt()
    with reported_once(World.single()):
        argv = sys.argv[1:]
        nproc, port, force = options.NPROC.pop(argv), options.PORT.pop(argv), options.FORCE.pop(argv)
        restarts, dry_run = options.RESTARTS.pop(argv), nodes.DRY_RUN.pop(argv)
        # with strategy=auto the ranks choose: here one layout that fits is enough to check the rest
        parser = cli.parser(options.LOCAL, __doc__ or "")
        config = cli.parse(parser, laid_out(argv, nproc, kept=1)[0])[0]
        cli.check(config, nproc)
        line = torchrun_line(parser.parse_intermixed_args(argv).overrides, nproc, port=port, restarts=restarts)
        if dry_run:
            print(shlex.join(["torchrun", *line]), flush=True)
            return
        check_text(config, nproc)
        check_machine(config, nproc, port)
        if not force:
            check_memory(config, nproc)
        make_folder(config.metrics.dir)
    env, notes = local_environment(nproc, os.environ)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    print(shlex.join(["torchrun", *line]), flush=True)
    sys.exit(run_here(line, env, restarts=restarts, timeout_s=config.runtime.timeout_s))


def check_text(config: Config, nproc: int) -> None:
    """Raise BadInput for a text that cannot be trained on. The fixes that it proposes break no other rule."""
    try:
        load_corpus(config)
    except BadInput as error:
        raise BadInput(*(completed(problem, Plan(config, nproc)) for problem in error.problems)) from error


def check_folder(metrics_dir: str) -> None:
    """Raise BadInput (exit code 3) for a folder that cannot be made or written, as far as this is visible without
    trying."""
    if why := obstacle(metrics_dir):
        shown = f"{metrics_dir[:40]}…" if why == errno.ENAMETOOLONG else metrics_dir
        raise unusable(shown, os.strerror(why))


def make_folder(metrics_dir: str) -> None:
    """Make the folder. This is the last check, as some folders, such as those in /proc, fail only when they are
    made."""
    try:
        Path(metrics_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable(metrics_dir, error.strerror) from error


def check_machine(config: Config, nproc: int, port: int | None) -> None:
    """Raise BadInput (exit code 3) for a device, backend, port or folder that cannot be used on this machine."""
    check_folder(config.metrics.dir)
    if port is not None:
        try:
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError as error:
            problem = f"port={port} cannot be used ({error.strerror})"
            raise BadInput(
                Problem("port", problem, "use another port, or leave it out for a free one", exit_code=EXIT_ENVIRONMENT)
            ) from error
    chosen = (config.runtime.device, config.runtime.backend) != ("auto", "auto")
    if chosen or config.runtime.elastic or config.strategy.needed_backend():
        # this imports torch, for which an `auto` run does not have to wait
        from train.ranks.distributed import check_backend, choose_runtime

        runtime = choose_runtime(config.runtime, World(0, 0, nproc, nproc, from_torchrun=True))
        check_backend(config.strategy, runtime.backend)


if __name__ == "__main__":
    lasting()
    main()
