"""A model in ExecuTorch's Python runtime, with XNNPACK's kernels."""

from __future__ import annotations

from pathlib import Path

import torch  # noqa: F401  (its libraries must be loaded before those of ExecuTorch)

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Slotted
from scripts.exporting.running.torched import graph_of


class Runner(Slotted):
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        from executorch.extension.pybindings.portable_lib import Verification, _unsafe_reset_threadpool
        from executorch.runtime import Runtime

        _unsafe_reset_threadpool(threads)  # nothing runs in it yet, which is what makes it unsafe
        file = folder / artefact.target.file
        self.program = Runtime.get().load_program(file, verification=Verification.InternalConsistency)
        method = self.program.load_method("forward")
        super().__init__(graph_of(lambda *inputs: method.execute(inputs)), artefact.shape, batched=False)
