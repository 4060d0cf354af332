"""A trained model as a plain module in one process, from a checkpoint of any strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint.folder import CHECKPOINTS
from train.checkpoint.manifest import MANIFEST, Manifest
from train.checkpoint.whole.newest import newest
from train.checkpoint.whole.tensors import whole_tensor
from train.command import cli
from train.config.problems import BadInput, Problem
from train.config.rules.idle import written
from train.config.schema import Config, Precision
from train.data.corpus import Corpus, load_corpus
from train.model.transformer import CrossEntropy, Transformer, dtypes
from train.model.weights import global_parameters
from train.ranks.state import persistent_buffers
from train.record.run_files import Unreadable
from train.record.run_folder import flat, read_config

OF_DATA = ("path", "dtype", "glob", "field")  # where a text is, which a manifest does not say
DERIVED = "data.corpus_sha256"

LogitsOf = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trained:
    """`folder`: the checkpoint. `config`: of the run that saved it, as if one process had trained it."""

    folder: Path
    manifest: Manifest
    config: Config

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which has the hash of every file."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its global name, in the host's memory. Raises Damaged."""
        keys = [key for key in self.manifest.tensors if key.startswith(("parameter/", "buffer/"))]
        return {key.partition("/")[2]: whole_tensor(self.folder, self.manifest, key) for key in keys}

    def model(self, *, device: str = "cpu", precision: Precision | None = None) -> Transformer:
        """The model with its weights, in evaluation mode and without gradients. `precision`: another one than that of
        the run. Raises Damaged, and BadInput if the tensors are not those of the model."""
        model = empty_model(self.config, device=device, precision=precision)
        fill(model, self.tensors(), str(self.folder))
        return model

    def corpus(self) -> Corpus:
        """The text that the run was trained on. Raises BadInput if it is not there, or is another one now."""
        corpus = load_corpus(self.config)
        if corpus.sha256 != self.manifest.work.get("data", {}).get("corpus_sha256"):
            message = f"{corpus.name} is another text than {self.folder} was trained on"
            raise BadInput(Problem("corpus", message, "put the text back as it was, where the run read it"))
        return corpus


def open_trained(path: Path) -> Trained:
    """The newest good checkpoint of a run, or the checkpoint itself. Raises BadInput."""
    folder = newest(path)
    manifest = Manifest.read(folder)
    return Trained(folder, manifest, _config(folder, manifest))


def empty_model(config: Config, *, device: str = "cpu", precision: Precision | None = None) -> Transformer:
    """The model of a config, whose weights have memory but no values yet, in evaluation mode and without gradients."""
    model = Transformer(config.model, **dtypes(precision or config.precision))
    model.to_empty(device=device)
    model.tie()  # `to_empty` has made two of a weight that is shared
    model.rope = model.rope.to(device)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(model: Transformer, tensors: dict[str, Tensor], source: str) -> None:
    """Copy the tensors into the parameters and the persistent buffers of the same names. Raises BadInput if a name or a
    shape is another one. `source`: where the tensors are from, for the message."""
    own = {**global_parameters(model, model.config), **dict(persistent_buffers(model))}
    for name in sorted(own.keys() | tensors.keys()):
        here, there = own.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            words = ["missing" if x is None else str(list(x.shape)) for x in (there, here)]
            message = f"{source} does not have the weights of this model: {name} is {words[0]}, not {words[1]}"
            raise BadInput(Problem("weights", message, "give a run of this program"))
        here.copy_(there)


def validation_loss(logits_of: LogitsOf, config: Config, corpus: Corpus, device: str = "cpu") -> float:
    """The mean loss per valid token on the run's own validation batches. `logits_of`: tokens BT -> logits BTV."""
    count, size, loss = config.train.eval_batches, config.train.global_batch_size, CrossEntropy()
    total = number = 0.0
    with torch.no_grad():
        for index in range(count):
            tokens, targets = corpus.validation_batch(index, count, size, slice(None))
            targets = targets.to(device)
            for rows, labels in zip(tokens.to(device).split(8), targets.split(8), strict=True):
                total += float(loss(logits_of(rows), labels))
            number += int((targets >= 0).sum())
    return total / number


def _config(folder: Path, manifest: Manifest) -> Config:
    """The config of the run in one process, from the manifest and, for the place of its text, config.yaml. Raises
    BadInput if they are not of a run of this program."""
    values = {key: value for key, value in flat(manifest.work).items() if key != DERIVED}
    if folder.parent.name == CHECKPOINTS:
        try:
            stored = read_config(folder.parent.parent)
        except Unreadable as error:
            raise BadInput(Problem("config", f"{folder.parent.parent}: {error}", "give another run")) from error
        values |= {f"data.{name}": stored[f"data.{name}"] for name in OF_DATA if f"data.{name}" in stored}
    try:
        config = cli.configured(["strategy=single", *_words(values)])
        cli.check(config, 1)
    except BadInput as error:
        said = "; ".join(problem.message for problem in error.problems)
        message = f"{folder} is no checkpoint of this version of the program: {said}"
        raise BadInput(Problem("config", message, "give a checkpoint of a run of this version")) from error
    return config


def _words(values: dict[str, Any]) -> list[str]:
    """Overrides with these values. The groups that have no default of their own begin with a preset."""
    name = {"sgd": "sgd"}.get(str(values.get("optim.name")), "adamw")
    return [f"optim={name}", *(f"{key}={written(value)}" for key, value in values.items())]
