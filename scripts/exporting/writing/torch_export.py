"""The graph as a program of torch.export, without the sample inputs, which torch would pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scripts.exporting.writing.graph import exported
from train.model.transformer import Transformer


def write(model: Transformer, quant: str, facts: dict[str, str], file: Path) -> None:
    program = exported(model, batched=True)
    program.example_inputs = None
    torch.export.save(program, file, extra_files={"facts.json": json.dumps(facts)})
