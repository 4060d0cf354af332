"""A trained model as a plain module in one process, from a checkpoint of any strategy."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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
from train.record.run_files import GIVEN, Unreadable
from train.record.run_folder import flat, read_config

OF_DATA = ("path", "dtype", "glob", "field")  # where a text is, which a manifest does not say
DERIVED = "data.corpus_sha256"

LogitsOf = Callable[[Tensor], Tensor]


class Opened(Protocol):
    """A trained model: `Trained` here, and what other tools make of it. `words`: the overrides that compose `config`.
    `sha256`: of the file that has the hashes of the others. `facts`: what a user is told of it."""

    @property
    def folder(self) -> Path: ...
    @property
    def words(self) -> tuple[str, ...]: ...
    @property
    def config(self) -> Config: ...
    @property
    def sha256(self) -> str: ...
    @property
    def facts(self) -> dict[str, Any]: ...
    def tensors(self) -> dict[str, Tensor]: ...
    def model(self, *, device: str = "cpu", precision: Precision | None = None) -> Transformer: ...
    def corpus(self) -> Corpus: ...


@dataclass(frozen=True)
class Trained:
    """`folder`: the checkpoint. `words`: the overrides with which one process would have trained it, and `config` what
    they compose."""

    folder: Path
    manifest: Manifest
    words: tuple[str, ...]
    config: Config

    @property
    def sha256(self) -> str:
        """The hash of the manifest, which has the hash of every file."""
        return hashlib.sha256((self.folder / MANIFEST).read_bytes()).hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        return {"step": self.manifest.step}

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
        return corpus_of(self.config, self.manifest.work, self.folder)


def open_trained(path: Path) -> Trained:
    """The newest good checkpoint of a run, or the checkpoint itself. Raises BadInput."""
    folder = newest(path)
    manifest = Manifest.read(folder)
    words = words_of(manifest.work, folder.parent.parent if folder.parent.name == CHECKPOINTS else None)
    return Trained(folder, manifest, words, config_of(words, folder))


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


def corpus_of(config: Config, work: dict[str, Any], source: Path) -> Corpus:
    """The text of a config, which must be that of the work. Raises BadInput. `source`: what was trained on it."""
    corpus = load_corpus(config)
    if corpus.sha256 != work.get("data", {}).get("corpus_sha256"):
        message = f"{corpus.name} is another text than {source} was trained on"
        raise BadInput(Problem("corpus", message, "put the text back as it was, where the run read it"))
    return corpus


def words_of(work: dict[str, Any], run: Path | None) -> tuple[str, ...]:
    """The overrides with which one process does this work. `run`: the directory whose config.yaml says where the text
    is. The groups that have no default of their own begin with a preset. Raises BadInput."""
    own = {group: values for group, values in work.items() if group != GIVEN}  # a trained model is without it
    values = {key: value for key, value in flat(own).items() if key != DERIVED}
    if run is not None:
        try:
            stored = read_config(run)
        except Unreadable as error:
            raise BadInput(Problem("config", f"{run}: {error}", "give another run")) from error
        values |= {f"data.{name}": stored[f"data.{name}"] for name in OF_DATA if f"data.{name}" in stored}
    name = {"sgd": "sgd"}.get(str(values.pop("optim.name", "")), "adamw")  # a trained model needs no AdamW in 8 bits
    return ("strategy=single", f"optim={name}", *(f"{key}={written(value)}" for key, value in values.items()))


def config_of(words: Sequence[str], source: Path) -> Config:
    """The config of these overrides in one process. Raises BadInput if they are not of a run of this program."""
    try:
        config = cli.configured(words)
        cli.check(config, 1)
    except BadInput as error:
        said = "; ".join(problem.message for problem in error.problems)
        message = f"{source} was not made by this version of the program: {said}"
        raise BadInput(Problem("config", message, "give a run of this version")) from error
    return config
