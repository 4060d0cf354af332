"""Opens what has a trained model: a run, one of its checkpoints, or a compressed run. No file of them is unpickled.

opened = open_model(Path("runs/x"))      Trained or Compressed: `config`, `sha256`
opened.model(device="cpu")               a module for evaluation: tokens BT -> logits BTV
opened.tensors()                         every weight by its global name, in float32, as the module computes with it
opened.corpus()                          the text of the run
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.compressing.methods.layers import linear_layers
from scripts.compressing.methods.schemes import SCHEMES
from scripts.compressing.packed import CODES, MASK, VALUES, dense, owner
from scripts.compressing.record import COMPRESSION, WEIGHTS, Record, is_compressed, sha256_of
from train.checkpoint.whole.trained import (
    Trained,
    config_of,
    corpus_of,
    empty_model,
    fill,
    open_trained,
    words_of,
)
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem
from train.config.schema import Config, Precision
from train.data.corpus import Corpus
from train.model.transformer import Transformer


@dataclass(frozen=True)
class Compressed:
    """A compressed run, which computes in float32. `method`, `weights_sha256`, `work`: as in its record."""

    folder: Path
    method: str
    weights_sha256: str
    work: dict[str, Any]
    words: tuple[str, ...]
    config: Config

    @property
    def sha256(self) -> str:
        return sha256_of(self.folder / COMPRESSION)

    @property
    def facts(self) -> dict[str, Any]:
        return {"method": self.method, "precision": Precision.float32.value}

    def stored(self) -> dict[str, Tensor]:
        """The tensors of the file, as packed.py describes them. Raises BadInput if the file is not as it was
        written."""
        need_safetensors("a compressed run")
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.folder / WEIGHTS
        try:
            if sha256_of(path) != self.weights_sha256:
                raise self._wrong("has another SHA-256 than when it was written")
            return load_file(path)
        except OSError as error:
            raise self._wrong(f"cannot be read ({error.strerror})") from error
        except SafetensorError as error:
            raise self._wrong(f"is no file of safetensors ({error})") from error

    @torch.no_grad()
    def model(self, *, device: str = "cpu", precision: Precision | None = None) -> Transformer:
        """The model with small weights where its method has them. Raises BadInput."""
        if precision not in (None, Precision.float32):
            message = f"precision={precision.value} is not possible: {self.folder} computes in float32"
            raise BadInput(Problem("precision", message, "use precision=float32"))
        stored = self.stored()
        model = empty_model(self.config, precision=Precision.float32)
        layers = linear_layers(model)
        quantised = [name for name in layers if f"{name}{CODES}" in stored]
        others: dict[str, Tensor] = {}
        try:
            for key, value in stored.items():
                name = owner(key)
                if key.endswith(MASK):
                    others[name] = dense(value, stored[f"{name}{VALUES}"], model.get_parameter(name).shape)
                elif name not in quantised and not key.endswith(VALUES):
                    others[name] = value
        except (ValueError, LookupError, AttributeError) as error:
            raise self._wrong(f"has no weights of this model ({error})") from error
        for name in quantised:
            others[name] = torch.zeros_like(layers[name].weight)
        fill(model, others, str(self.folder / WEIGHTS))
        model.to(device)
        model.rope = model.rope.to(device)
        self._restore(model, quantised, stored)
        return model

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its global name, with what quantised layers compute with. Raises BadInput."""
        model = self.model()
        found = {name: value for name, value in self.stored().items() if owner(name) == name}
        for name, layer in linear_layers(model).items():
            found[name] = self.weight(layer)
        return found

    def weight(self, layer: nn.Linear) -> Tensor:
        """The weight [O, I] that a layer of its model computes with."""
        scheme = SCHEMES.get(self.scheme)
        return layer.weight if scheme is None else scheme.dense(layer)

    @property
    def scheme(self) -> str:
        """The name in SCHEMES of what its layers were quantised with; another one if they were not."""
        return self.method.removeprefix("qat_")

    def corpus(self) -> Corpus:
        """The text that the parent was trained on. Raises BadInput if it is not there, or is another one now."""
        return corpus_of(self.config, self.work, self.folder)

    def _restore(self, model: Transformer, names: list[str], stored: Mapping[str, Tensor]) -> None:
        scheme = SCHEMES.get(self.scheme)
        if scheme is None:
            if names:
                raise self._wrong(f"has codes, but {self.method} makes none")
            return
        scheme.check(self.method)
        scheme.apply(model, names)
        for name in names:
            parts = {key.removeprefix(name): value for key, value in stored.items() if owner(key) == name}
            try:
                scheme.restore(model.get_submodule(name.removesuffix(".weight")), parts)
            except (ValueError, LookupError) as error:
                raise self._wrong(f"has no weights of this model ({name}: {error})") from error

    def _wrong(self, why: str) -> BadInput:
        fix = "compress the run again"
        return BadInput(Problem("compressed_run", f"{self.folder} cannot be used: {WEIGHTS} {why}", fix))


def open_model(path: Path) -> Trained | Compressed:
    """The trained model that a path names. Raises BadInput."""
    return open_compressed(path) if is_compressed(path) else open_trained(path)


def open_compressed(path: Path) -> Compressed:
    """Raises BadInput."""
    record = Record.read(path)
    words = words_of(record.work, path)
    return Compressed(path, record.method, record.weights_sha256, record.work, words, config_of(words, path))


def need_safetensors(what: str) -> None:
    """Raise BadInput (exit code 3) if safetensors is not installed."""
    if importlib.util.find_spec("safetensors") is None:
        message = f"{what} needs safetensors, which is not installed"
        raise BadInput(Problem("extra", message, 'pip install "strategy-lab[compress]"', exit_code=EXIT_ENVIRONMENT))
