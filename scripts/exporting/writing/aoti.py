"""The graph compiled by AOTInductor: a package with a library for processors like this one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch._inductor import aoti_compile_and_package

from scripts.exporting.writing.graph import exported
from train.model.transformer import Transformer


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    # the number of threads is that of the process that loads it, not of this one
    options = {"aot_inductor.metadata": facts, "cpp.dynamic_threads": True}
    with torch.no_grad():
        aoti_compile_and_package(exported(model, batched=True), package_path=str(file), inductor_configs=options)
