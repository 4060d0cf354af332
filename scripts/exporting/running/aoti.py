"""A model that AOTInductor has compiled: a library of native code, which can do anything as soon as it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._inductor import aoti_load_package

from scripts.exporting.artefact import Artefact
from scripts.exporting.running.slots import Slotted
from scripts.exporting.running.torched import graph_of


class Runner(Slotted):
    def __init__(self, folder: Path, artefact: Artefact, threads: int) -> None:
        torch.set_num_threads(threads)
        compiled = aoti_load_package(str(folder / artefact.target.file))
        super().__init__(graph_of(compiled), artefact.shape, batched=True)
