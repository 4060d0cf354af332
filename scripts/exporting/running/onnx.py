"""A model in onnxruntime, on the CPU. Torch is not imported."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Slotted

INPUTS = ("tokens", "position", "keys", "values")


class Runner(Slotted):
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 3  # errors; what it finds odd in its own optimised graphs is nobody's concern
        file = str(folder / artefact.target.file)
        self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        super().__init__(self._graph, artefact.shape, batched=True)

    def _graph(self, *inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        logits, keys, values = self.session.run(None, dict(zip(INPUTS, inputs, strict=True)))
        return logits, keys, values
