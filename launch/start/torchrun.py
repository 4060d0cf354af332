"""Run torchrun as a child process with its output in a file, wait for it, and end it together with all its ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from launch.start.alive import RANKS
from launch.start.environment import local_environment, source_path, torchrun_line
from launch.start.progress import Progress
from train.config.world import LOCK, RUN_FILE

PATIENCE_S = 35.0  # torchrun gives its ranks 30 s between TERM and KILL
POLL_S = 1.0  # the interval between updates of the progress
NUM_LINES, WIDTH = 8, 200  # how much of a log is shown

# (overrides, nproc, log, the file in which rank 0 writes its run's directory) -> exit code
Start = Callable[[Sequence[str], int, Path, Path], int]


def torchrun(overrides: Sequence[str], nproc: int, log: Path, run_file: Path) -> int:
    """Run torchrun and return its exit code. Ctrl-C, TERM or KILL of this process ends the ranks too. Call it from the
    main thread."""
    lock = str((run_file.parent / RANKS).resolve())
    env, _ = local_environment(nproc, os.environ)
    env |= {RUN_FILE: str(run_file.resolve()), LOCK: lock} | source_path()
    # -P: a module in the working directory, for example somebody's train.py, must not replace one of this program
    agent = [sys.executable, "-P", "-m", "launch.start.agent", str(os.getpid()), lock]
    progress = Progress(run_file, log)
    with log.open("w") as output:
        # in a new session, so that ctrl-C in a terminal reaches only this process, which then ends torchrun in order
        process = subprocess.Popen(
            [*agent, *torchrun_line(overrides, nproc)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            while True:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(POLL_S)
                progress.show()
        finally:
            progress.clear()
            if process.poll() is None:
                _end(process)


def last_words(log: Path) -> list[str]:
    """The last lines of a failed run's log, without torchrun's report."""
    text = log.read_text(errors="replace")
    own = re.split(r"^[EWI]\d{4} .*torch/distributed/elastic", text, maxsplit=1, flags=re.MULTILINE)[0].rstrip()
    lines = [line for line in (own or text.rstrip() or "(no output)").splitlines() if line.strip()]
    return [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines[-NUM_LINES:]]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Send TERM, which torchrun forwards to its ranks. After PATIENCE_S or a second ctrl-C, kill what is left."""
    parent = psutil.Process(process.pid)
    family = [
        *parent.children(recursive=True),
        parent,
    ]  # ranks have their own sessions and may live longer than torchrun
    try:
        process.terminate()
        process.wait(PATIENCE_S)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for one in family:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()
