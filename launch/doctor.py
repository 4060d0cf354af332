"""Examine this machine before a run: python -m launch.doctor

Looks for what stops a run, slows it down or spoils its measurements: versions of packages, variables that another
launch left in the environment, cores, memory, disks, the name of the machine, torch with its devices, and an all-reduce
of two processes. Each finding is ok, a warning or an error, and comes with its fix.

Takes every override that train/main.py takes, and reads metrics.dir and runtime.* of them. The exit code is 3 if
something stops a run, 2 if the command line is wrong, and 0 otherwise. Nothing stays behind, also not of a
launch.netlab that was killed. What does not answer in time is given up, so that the doctor ends within limit_s: an
error, or a warning if two ranks had too little time.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
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

SHARE = 0.85  # of limit_s, after which what hangs is given up; the rest is for the start of Python and for the end
Judge = Callable[[float], list[Finding]]  # waits for a process until a time of `time.monotonic`, and judges its answers
NARROWEST, WIDEST = 60, 120
LEVEL, SUBJECT = 9, 17  # the widths of the first two columns


@dataclass(frozen=True)
class Task:
    """The command line. `metrics_dir` is None and `runtime` empty if no config can be composed; `wrong` says why."""

    as_json: bool
    limit_s: int = 10  # the default of the option, which cannot be read if packages are missing
    nproc: int = 1
    metrics_dir: str | None = None
    runtime: Mapping[str, Any] = field(default_factory=dict)
    wrong: tuple[Finding, ...] = ()


def main() -> None:
    started, found = time.monotonic(), []
    first = guarded(packages.SUBJECT, lambda: _packages(os.environ))
    with reported_once(World.single()):
        task = read(sys.argv[1:], broken=any(one.level is Level.ERROR for one in first))
    examined = examine(task, os.environ, started + SHARE * task.limit_s)
    for one in (finding for part in (first, task.wrong, examined) for finding in part):
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
    argv, as_json, limit_s = [*argv], "--json" in argv, Task.limit_s
    try:
        # these need packages whose absence is a finding
        from train.command import cli, options

        limit_s, nproc = options.LIMIT_S.pop(argv), options.NPROC.pop(argv)
        parser = cli.parser(options.DOCTOR, __doc__ or "")
        parser.add_argument("--json", action="store_true")
        config, *_ = cli.parse(parser, argv)
    except BadInput as refused:
        if refused.exit_code != EXIT_ENVIRONMENT and not broken:
            raise
        return Task(as_json, limit_s, wrong=tuple(error("config", one.message, one.fix) for one in refused.problems))
    except Exception as why:
        message = f"no config can be composed ({type(why).__name__}: {why}), so the run directory is not known"
        return Task(as_json, limit_s, wrong=(error("config", message, "see the findings about packages"),))
    return Task(as_json, limit_s, nproc, config.metrics.dir, dataclasses.asdict(config.runtime))


def examine(task: Task, env: Mapping[str, str], deadline: float) -> Iterator[Finding]:
    """All findings but those about packages, each as soon as it is known. What may hang is examined by processes, which
    run at the same time, each until `deadline`, a time of `time.monotonic`."""
    judges: list[tuple[str, Judge]] = []
    with ExitStack() as running:

        def begin(subject: str, start: Callable[[Task, Mapping[str, str], ExitStack], Judge]) -> list[Finding]:
            judges.append((subject, start(task, env, running)))
            return []

        for subject, start in (("disks", _folders), (names.SUBJECT, _names), ("torch", _torch)):
            yield from guarded(subject, partial(begin, subject, start))
        interfaces = [name for _, name in socket.if_nameindex()]
        yield from guarded(variables.SUBJECT, lambda: variables.judge(env, interfaces))
        yield from guarded("machine", lambda: machine.judge(machine.here(), task.nproc, env))
        yield from guarded("connections", names.connection)
        yield from guarded("emulated hosts", _emulated)
        for subject, judge in judges:
            yield from guarded(subject, partial(judge, deadline))


def _packages(env: Mapping[str, str]) -> list[Finding]:
    needs = packages.required()
    return packages.judge(needs, packages.installed(needs, env))


def _emulated() -> list[Finding]:
    from launch.examine import emulated  # it needs packages whose absence is a finding

    return emulated.judge()


def _folders(task: Task, env: Mapping[str, str], running: ExitStack) -> Judge:
    asked = {} if task.metrics_dir is None else {folders.RUNS: task.metrics_dir}
    asked |= {folders.TEMPORARY: env.get("TMPDIR") or "/tmp", folders.SHARED: folders.SHARED}
    child = running.enter_context(Child("launch.examine.folders", asked, env))
    return lambda deadline: folders.judge(child.answers(deadline), asked)


def _names(task: Task, env: Mapping[str, str], running: ExitStack) -> Judge:
    own = socket.gethostname()
    asked = [own, *filter(None, [env.get("MASTER_ADDR")])]
    child = running.enter_context(Child("launch.examine.names", asked, {**SHORT_LOOKUP, **env}))
    return lambda deadline: names.judge(child.answers(deadline), own, env)


def _torch(task: Task, env: Mapping[str, str], running: ExitStack) -> Judge:
    nvidia = any(Path("/dev").glob("nvidia[0-9]*"))
    # the environment of a run; with SHORT_LOOKUP the name of this machine is not looked up once more
    of_a_run, _ = local_environment(2, {**SHORT_LOOKUP, **env})
    asked = {"runtime": task.runtime, "nproc": task.nproc}
    child = running.enter_context(Child("launch.examine.ranks", asked, of_a_run))
    return lambda deadline: torch_here.judge(child.answers(deadline), env, nvidia=nvidia)


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
