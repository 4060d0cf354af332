"""Makes an export: writes the model's file, loads it back in its own runtime, compares it, and measures its decoding.

The folder of the export is complete or not there.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

import torch

from scripts.exporting import bound, checking
from scripts.exporting.artefact import Artefact, Shape, measured
from scripts.exporting.running.opened import run
from scripts.exporting.targets import EXACT, Target, check
from train.checkpoint.whole.trained import Opened, empty_model, fill
from train.command.resources import source_commit
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, Reported
from train.config.schema import Precision
from train.data.corpus import Corpus


class NotWritten(Reported):
    exit_code = EXIT_ENVIRONMENT


def make(opened: Opened, target: Target, quant: str, folder: Path, licence: str) -> Artefact:
    """Write the export into the new folder. Raises BadInput, Differs, and NotWritten for a disk that fails."""
    corpus = opened.corpus()
    check(target, quant, opened.config.model, corpus.is_bytes)
    if os.path.lexists(folder):
        raise BadInput(Problem("exists", f"{folder} exists already", "name a new folder with out=FOLDER"))
    unfinished = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        artefact = _made(opened, target, quant, unfinished, corpus, facts(opened, target, corpus, licence))
        artefact.write(unfinished)
        os.rename(unfinished, folder)
    except OSError as error:
        raise NotWritten(f"{folder} cannot be written ({error.strerror or error}): name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return artefact


def _made(opened: Opened, target: Target, quant: str, folder: Path, corpus: Corpus, told: dict[str, str]) -> Artefact:
    model = empty_model(opened.config, precision=Precision.float32)
    fill(model, opened.tensors(), str(opened.folder))
    config = model.config
    writer = importlib.import_module(f"scripts.exporting.writing.{target.name}")
    writer.write(model, quant, told, folder / target.file)
    files = measured(folder)
    head_apart = not config.tie_embeddings or target.splits_head or quant not in EXACT
    read = bound.weights_read(config, files[target.file].bytes, head_apart=head_apart)
    artefact = Artefact(target, quant, Shape.of(config), told, files, read, {})
    runner = run(folder, artefact, torch.get_num_threads())
    artefact.checks.update(checking.compare(model, runner, artefact, opened.config, corpus))
    speed, tokens = checking.decode_speed(runner, corpus)
    most = bound.most_tokens_per_s(artefact, tokens, bound.read_bandwidth(torch.get_num_threads()))
    artefact.checks.update(threads=torch.get_num_threads(), decode_tokens_per_s=speed, most_tokens_per_s=most)
    return artefact


def facts(opened: Opened, target: Target, corpus: Corpus, licence: str) -> dict[str, str]:
    """What the artefact says about itself, as texts."""
    packages = {name: version(name) for name in ("torch", *target.needs)}
    versions = {"python": platform.python_version(), **packages}
    return {
        "tokenizer": "bytes: the id of a token is the value of a byte" if corpus.is_bytes else f"ids of {corpus.name}",
        "licence": licence,
        "commit": source_commit(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "parent": str(opened.folder),
        "parent_sha256": opened.sha256,
    }
