"""Examine this machine before a run: python -m launch.doctor

Looks for what stops a run, slows it down or spoils its measurements: versions of packages, variables that another
launch left in the environment, cores, memory, disks, the name of the machine, torch with its devices, and an all-reduce
of two processes. Each finding is ok, a warning or an error, and comes with its fix.

Takes every override that train/main.py takes, and reads metrics.dir and runtime.* of them. The exit code is 3 if
something stops a run, 2 if the command line is wrong, and 0 otherwise. Nothing stays behind.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.examine import folders, machine, names, packages, torch_here, variables
from launch.examine.child import Child
from launch.examine.finding import Finding, Level, error, guarded
from launch.start.environment import SHORT_LOOKUP, local_environment
from train.command.process.exits import reported_once
from train.command.process.streams import lasting
from train.config.plain_json import dumps
from train.config.problems import EXIT_ENVIRONMENT, BadInput
from train.config.world import World

NAMES_S, FOLDERS_S, TORCH_S = 5.0, 10.0, 90.0  # after which a part that hangs is given up; each usually takes far less
NARROWEST, WIDEST = 60, 120
LEVEL, SUBJECT = 9, 17  # the widths of the first two columns


@dataclass(frozen=True)
class Task:
    """The command line. `metrics_dir` is None and `runtime` empty if no config can be composed; `wrong` says why."""

    as_json: bool
    nproc: int = 1
    metrics_dir: str | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    wrong: tuple[Finding, ...] = ()


def main() -> None:
    started, found = time.monotonic(), []
    first = guarded(packages.SUBJECT, lambda: _packages(os.environ))
    with reported_once(World.single()):
        task = read(sys.argv[1:], broken=any(one.level is Level.ERROR for one in first))
    for one in (finding for part in (first, task.wrong, examine(task, os.environ)) for finding in part):
        found.append(one)
        if not task.as_json:
            print("\n".join(lines(one)), flush=True)
    code = EXIT_ENVIRONMENT if any(one.level is Level.ERROR for one in found) else 0
    seconds = time.monotonic() - started
    if task.as_json:
        findings = [dataclasses.asdict(one) for one in found]
        print(dumps({"exit_code": code, "seconds": seconds, "findings": findings}, indent=2))
    else:
        print(f"\n{summary(found)} ({seconds:.1f} s)")
    raise SystemExit(code)


def read(argv: Sequence[str], *, broken: bool) -> Task:
    """Read the command line. Raises BadInput if it is wrong. `broken`: a package is missing or has a wrong version, so
    that the packages may be to blame."""
    argv, as_json = [*argv], "--json" in argv
    try:
        # these need packages whose absence is a finding
        from train.command import cli, options

        nproc = options.NPROC.pop(argv)
        parser = cli.parser(options.DOCTOR, __doc__ or "")
        parser.add_argument("--json", action="store_true")
        config, *_ = cli.parse(parser, argv)
    except BadInput as refused:
        if refused.exit_code != EXIT_ENVIRONMENT and not broken:
            raise
        return Task(as_json, wrong=tuple(error("config", one.message, one.fix) for one in refused.problems))
    except Exception as why:
        message = f"no config can be composed ({type(why).__name__}: {why}), so the run directory is not known"
        return Task(as_json, wrong=(error("config", message, "see the findings about packages"),))
    return Task(as_json, nproc, config.metrics.dir, dataclasses.asdict(config.runtime))


def examine(task: Task, env: Mapping[str, str]) -> Iterator[Finding]:
    """All findings but those about packages, each as soon as it is known."""
    interfaces = [name for _, name in socket.if_nameindex()]
    yield from guarded(variables.SUBJECT, lambda: variables.judge(env, interfaces))
    yield from guarded("machine", lambda: machine.judge(machine.here(), task.nproc, env))
    yield from guarded("disks", lambda: _folders(task, env))
    yield from guarded(names.SUBJECT, lambda: _names(env))
    yield from guarded("connections", names.connection)
    yield from guarded("torch", lambda: _torch(task, env))


def _packages(env: Mapping[str, str]) -> list[Finding]:
    needs = packages.required()
    return packages.judge(needs, packages.installed(needs, env))


def _folders(task: Task, env: Mapping[str, str]) -> list[Finding]:
    asked = {} if task.metrics_dir is None else {folders.RUNS: task.metrics_dir}
    try:
        asked[folders.TEMPORARY] = tempfile.gettempdir()
    except FileNotFoundError:  # no folder can be written: the message names the one that should be
        asked[folders.TEMPORARY] = env.get("TMPDIR") or "/tmp"
    asked[folders.SHARED] = folders.SHARED
    return folders.judge(Child("launch.examine.folders", asked, env).answers(FOLDERS_S), asked)


def _names(env: Mapping[str, str]) -> list[Finding]:
    own = socket.gethostname()
    asked = [own, *filter(None, [env.get("MASTER_ADDR")])]
    return names.judge(Child("launch.examine.names", asked, {**SHORT_LOOKUP, **env}).answers(NAMES_S), own, env)


def _torch(task: Task, env: Mapping[str, str]) -> list[Finding]:
    nvidia = any(Path("/dev").glob("nvidia[0-9]*"))
    # the environment of a run; with SHORT_LOOKUP the name of this machine is not looked up once more
    of_a_run, _ = local_environment(2, {**SHORT_LOOKUP, **env})
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        asked = {"runtime": task.runtime, "nproc": task.nproc, "folder": folder}
        return torch_here.judge(Child("launch.examine.ranks", asked, of_a_run).answers(TORCH_S), env, nvidia=nvidia)


def lines(finding: Finding) -> list[str]:
    """A finding as lines of three columns: its level, what was examined, and what was found with its fix."""
    width = min(max(shutil.get_terminal_size().columns, NARROWEST), WIDEST)
    indent = " " * (LEVEL + SUBJECT)
    head = f"{finding.level:<{LEVEL}}{finding.subject:<{SUBJECT}}"
    parts = [(head, finding.message), *([(indent, f"fix: {finding.fix}")] if finding.fix else [])]
    return [
        line
        for start, text in parts
        for line in textwrap.wrap(
            start + text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
        )
    ]


def summary(found: Sequence[Finding]) -> str:
    errors, warnings = (sum(one.level is level for one in found) for level in (Level.ERROR, Level.WARNING))
    stops = "nothing stops a run" if not errors else f"{errors} error{'s' * (errors > 1)}"
    return f"{stops}, {warnings} warning{'s' * (warnings != 1)}" if warnings else stops


if __name__ == "__main__":
    lasting()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that nothing stays behind
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
