"""torchrun in this process, with an observer who is told about its ranks and decides whether they are started again.

torchrun prints a traceback for every failure and exits with 1, whatever its ranks exited with. Here its observer says
what happened, once, and knows the exit codes of the ranks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from signal import Signals
from subprocess import Popen
from typing import Any, Protocol

import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, LogsDest, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api as launcher

from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem


class Observer(Protocol):
    def started(self, ranks: Mapping[int, Popen[bytes]]) -> None:
        """The ranks of this machine have been started, for the first time or again."""

    def failed(self, failures: Mapping[int, ProcessFailure], done: int, allowed: int) -> bool:
        """Ranks have failed, and all ranks have ended. Returns whether they are started again, for which `done` must be
        less than `allowed`."""


def run_torchrun(line: Sequence[str], observer: Observer, restarts_done: int = 0, logs: str = "") -> Signals | None:
    """Run torchrun with these arguments, from the main thread. Returns the signal that ended it, after all ranks had
    this signal too; None if none did. Raises BadInput (exit code 3) if torchrun's store cannot be opened.

    `restarts_done`: how many of the restarts that --max_restarts allows have been used by an earlier torchrun. `logs`:
    a folder in which each rank of this machine has its output too.
    """
    if "LOGLEVEL" not in os.environ:  # which asks for torchrun's own messages
        logger = logging.getLogger("torch.distributed.elastic")
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    # torch makes its agent itself, and has no other way to give it another one (torch 2.11 to 2.13)
    agent = partial(_Agent, observer=observer, restarts_done=restarts_done, logs=logs)
    launcher.LocalElasticAgent = agent  # type: ignore[misc, assignment]
    try:
        torchrun.run(torchrun.parse_args(line))
    except ChildFailedError:  # the observer knows it
        pass
    except SignalException as ended:
        return Signals(ended.sigval)
    except dist.DistError as error:
        said = str(error).splitlines()[0]
        problem = Problem("store", f"torchrun cannot start: {said}", "use another port", exit_code=EXIT_ENVIRONMENT)
        raise BadInput(problem) from error
    return None


class _LogOfEachRank(DefaultLogsSpecs):
    """rank-3.out and rank-3.err in a folder, by the number of the rank in the world. torchrun's own folders have random
    names, and number the ranks of each machine from 0 on."""

    def __init__(self, folder: Path) -> None:
        super().__init__(os.devnull)
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        found = super().reify(envs)
        self._folder.mkdir(parents=True, exist_ok=True)
        for local_rank, env in envs.items():
            start = "" if env["TORCHELASTIC_RESTART_COUNT"] == "0" else f".restart-{env['TORCHELASTIC_RESTART_COUNT']}"
            name = str(self._folder / f"rank-{env['RANK']}{start}")
            found.stdouts[local_rank] = found.tee_stdouts[local_rank] = f"{name}.out"
            found.stderrs[local_rank] = found.tee_stderrs[local_rank] = f"{name}.err"
        return found


class _Agent(LocalElasticAgent):
    """It uses private parts of torch's agent (torch 2.11 to 2.13): the processes, and the number of restarts left."""

    def __init__(self, *args: Any, observer: Observer, restarts_done: int, logs: str, **kwargs: Any) -> None:
        if logs:
            # one space, as torch would put a prefix of its own in the place of an empty one
            kwargs |= {"logs_specs": _LogOfEachRank(Path(logs)), "log_line_prefix_template": " "}
        super().__init__(*args, **kwargs)
        self._observer = observer
        self._remaining_restarts -= restarts_done

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        started = super()._start_workers(worker_group)
        processes: Any = self._pcontext
        handlers = processes.subprocess_handlers
        self._observer.started({one.global_rank: handlers[one.local_rank].proc for one in worker_group.workers})
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            allowed = worker_group.spec.max_restarts
            if not self._observer.failed(result.failures, allowed - self._remaining_restarts, allowed):
                self._remaining_restarts = 0
        return result
