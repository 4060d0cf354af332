"""Check a run, print its torchrun line and become it: python -m launch.local nproc=4 strategy=tp

Takes every override that train/main.py takes, and: nproc=N processes (1), port=P for torchrun's store (a free one).
Nothing is started if the command line, the data or the machine cannot do what is asked: exit code 2 or 3, one message.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.environment import become_torchrun, local_environment
from train import cli
from train.config import Config
from train.data import load_corpus
from train.exits import reported_once
from train.problems import EXIT_ENVIRONMENT, BadInput, Problem, unusable
from train.streams import lasting
from train.world import World

MAIN = Path(__file__).resolve().parent.parent / "train" / "main.py"


def main() -> None:
    with reported_once(World.single()):
        argv = sys.argv[1:]
        nproc, port = take(argv, "nproc", 1), take(argv, "port", None)
        parser = cli.parser("python -m launch.local [nproc=N] [port=P]", __doc__ or "")
        config, _, args = cli.parse(parser, argv)
        cli.check(config, nproc or 1)
        load_corpus(config)
        check_machine(config, nproc or 1, port)
    line = torchrun_line(args.overrides, nproc or 1, port)
    env, notes = local_environment(nproc or 1, os.environ)
    print("".join(f"{note}\n" for note in notes), end="", file=sys.stderr, flush=True)
    print(shlex.join(["torchrun", *line]), flush=True)
    become_torchrun(line, env)


def torchrun_line(overrides: Sequence[str], nproc: int, port: int | None = None) -> list[str]:
    """torchrun's arguments for one run on this machine, whose name it need not ask for."""
    where = "--standalone" if port is None else f"--master_port={port}"
    script = str(MAIN.relative_to(Path.cwd())) if MAIN.is_relative_to(Path.cwd()) else str(MAIN)
    return [where, "--local_addr=127.0.0.1", f"--nproc_per_node={nproc}", script, *overrides]


def take(argv: list[str], name: str, default: int | None) -> int | None:
    """Remove `name=N` from argv and return N. Raises BadInput if it is no positive whole number."""
    given = [arg for arg in argv if arg.startswith(f"{name}=")]
    for arg in given:
        argv.remove(arg)
    if not given:
        return default
    value = given[-1].partition("=")[2]
    if not re.fullmatch(r"[1-9]\d*", value) or (name == "port" and int(value) > 65535):
        raise BadInput(Problem(name, f"{given[-1]} is no {name}", f"use {name}= and a positive whole number"))
    return int(value)


def check_machine(config: Config, nproc: int, port: int | None) -> None:
    """Raise BadInput (exit code 3) for a device, backend, port or folder that this machine does not give."""
    folder = Path(config.metrics.dir).absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        raise unusable(config.metrics.dir, os.strerror(errno.ENOTDIR))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unusable(config.metrics.dir, os.strerror(errno.EACCES))
    if port is not None:
        try:
            with socket.create_server(("127.0.0.1", port)):
                pass
        except OSError as error:
            problem = f"port={port} cannot be used ({error.strerror})"
            raise BadInput(
                Problem("port", problem, "use another, or none for a free one", exit_code=EXIT_ENVIRONMENT)
            ) from error
    if (config.runtime.device, config.runtime.backend) != ("auto", "auto") or config.strategy.needed_backend():
        from train.distributed import (
            check_backend,
            choose_runtime,
        )  # loads torch, which an `auto` run need not wait for

        runtime = choose_runtime(config.runtime, World(0, 0, nproc, nproc, from_torchrun=True))
        check_backend(config.strategy, runtime.backend)


if __name__ == "__main__":
    lasting()
    main()
