"""Loads an artefact in its own runtime. Torch is not imported, unless the runtime is one that needs it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol

from scripts.exporting.artefact import Artefact, Shape, read
from scripts.exporting.running.slots import Array
from train.config.problems import BadInput, Problem


class Runner(Protocol):
    """A model in a runtime. The logits may be log-probabilities, which differ by one number for each token."""

    shape: Shape

    def logits(self, tokens_BT: Array) -> Array: ...

    def start(self, prompt_T: Array) -> Array: ...

    def step(self, token: int) -> Array: ...

    def speed(self, prompt_T: Array, count: int) -> tuple[float, float]: ...


def open_runner(folder: Path, *, threads: int = 1, trust: bool = False) -> tuple[Artefact, Runner]:
    """The artefact and its model. Raises BadInput for a file that is not what was written, native code without `trust`,
    a package that is missing (exit code 3), and a file that the runtime does not take."""
    artefact = read(folder)
    may_run(folder, artefact, trust)
    return artefact, run(folder, artefact, threads)


def may_run(folder: Path, artefact: Artefact, trust: bool) -> None:
    """Raises BadInput for native code without `trust`, and (exit code 3) for a package that is missing."""
    if artefact.target.native and not trust:
        message = f"{folder} holds native code, which can do anything on this machine as soon as it is loaded"
        raise BadInput(Problem("trust", message, "give trust=true if you trust whoever made it"))
    artefact.target.check_packages()


def run(folder: Path, artefact: Artefact, threads: int) -> Runner:
    """The model of an artefact that was read, in its runtime. Raises BadInput."""
    module = importlib.import_module(f"scripts.exporting.running.{artefact.target.name}")
    try:
        runner: Runner = module.Runner(folder, artefact, threads)
    except Exception as error:  # every runtime has its own kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        message = f"{folder} cannot be loaded by its runtime ({why})"
        raise BadInput(Problem("artefact", message, "write it again with scripts/export.py")) from error
    return runner
