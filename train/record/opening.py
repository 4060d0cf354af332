"""The first lines that a run prints: what it is, where its files are, and how it may differ from one device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from train.config.schema import Config
from train.data.corpus import Corpus
from train.measure.hardware import device_name
from train.model.transformer import Transformer, dtypes
from train.ranks.distributed import Runtime
from train.record.drawing import draw_mesh


def opening(config: Config, corpus: Corpus, runtime: Runtime, degrees: dict[str, int], world_size: int) -> str:
    """Layout and device, data, model, batch and precision. Parameters are those of the whole model, not of one rank."""
    train, training, held_out = config.train, len(corpus.training), len(corpus.validation)
    model = Transformer(config.model, **dtypes(config.precision))  # on the meta device
    num_parameters = sum(p.numel() for p in model.parameters())
    used = f"{device_name(runtime.device)}, {runtime.backend}, torch {torch.__version__}"
    tokens = train.global_batch_size * train.seq_len
    lines = [
        *([runtime.note] if runtime.note else []),
        f"strategy {config.strategy.name} on {world_size} process(es): {used}",
        draw_mesh(degrees),
        f"data {config.data.source.value}: {corpus.says}",
        f"  {training + held_out:,} tokens: {training:,} to train on, {held_out:,} held out",
        f"model {config.model.name}: {num_parameters:,} parameters, precision {config.precision.value}",
        f"batch: {train.global_batch_size:,} sequences of {train.seq_len:,} tokens, {tokens:,} tokens a step",
    ]
    return "\n".join(lines)


def announcement(path: Path, facts: dict[str, Any]) -> str:
    """The run's directory, and the differences from one device that the strategy declares in advance."""
    lines = [f"run: {path}"]
    if facts["differs"]:
        lines.append(f"expected to differ from one device in {', '.join(facts['differs'])}")
    if facts["lossy"]:
        lines.append(facts["lossy"]["says"])
    return "\n".join(lines)
