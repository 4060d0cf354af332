"""Makes a compressed run: starts from a trained model, trains if the method does, writes the weights and measures them.

The new directory has weights.safetensors, config.yaml and, at the end, compression.json. Until then the same command
continues it. A training has a directory in it, whose checkpoints are removed at the end.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scripts.compressing.measure import num_validated, sides, timing
from scripts.compressing.methods.layers import check_columns, check_dense, linear_layers
from scripts.compressing.methods.prune import prunable, prune
from scripts.compressing.methods.schemes import SCHEMES
from scripts.compressing.methods.student import even_layers, student_layers
from scripts.compressing.opened import Compressed, need_safetensors
from scripts.compressing.packed import sparse
from scripts.compressing.record import WEIGHTS, Record, label, sha256_of
from scripts.compressing.training import Training, training_of, words_for
from scripts.compressing.words import DISTIL, PRUNE_2_4, PRUNES, QAT, TOOL, TRAINED_ON, Task, words_of
from train.checkpoint.folder import CHECKPOINTS
from train.checkpoint.whole.trained import Opened, config_of, empty_model, fill, open_trained
from train.command import as_typed, cli
from train.command.resources import words_of as command_words
from train.config.problems import EXIT_ENVIRONMENT, BadInput, Problem, Reported
from train.config.schema import Config, Precision
from train.data.corpus import Corpus
from train.record.run_dir import environment, work
from train.record.run_files import write_whole

START = "start"  # the folder with the weights from which a training starts


@dataclass(frozen=True)
class Making:
    """One task, from its parent on. `out`: the new directory."""

    task: Task
    parent: Opened
    out: Path

    @cached_property
    def corpus(self) -> Corpus:
        return self.parent.corpus()

    @property
    def scheme(self) -> str:
        return self.task.method.removeprefix("qat_")

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of the new model."""
        if self.task.method != DISTIL:
            return self.parent.words
        layers = student_layers(self.parent.config.model.num_layers)
        kept = (word for word in self.parent.words if not word.startswith("model.num_layers="))
        return (*kept, f"model.num_layers={layers}")

    @cached_property
    def config(self) -> Config:
        return config_of(self.words, self.out)

    def check(self) -> None:
        """Raise BadInput for what cannot be done."""
        method = self.task.method
        need_safetensors(f"method={method}")
        allowed = () if method == DISTIL else (DISTIL, TRAINED_ON)  # a teacher is a run or a checkpoint
        if isinstance(self.parent, Compressed) and self.parent.method not in allowed:
            message = (
                f"method={method} cannot begin with {self.parent.folder}, which was made with {self.parent.method}"
            )
            raise BadInput(Problem("parent", message, "give the run that it was made of"))
        check_dense(self.parent.config.model, method)
        if self.scheme in SCHEMES:
            SCHEMES[self.scheme].check(method)
        model = empty_model(self.parent.config, device="meta")
        columns = SCHEMES[self.scheme].columns if self.scheme in SCHEMES else 4 if method == PRUNE_2_4 else 1
        check_columns(model, columns, method)

    def training(self) -> Training | None:
        """What the method trains, if it does."""
        task = self.task
        if not task.steps:
            return None
        own = []
        if self.changes_start:
            own += [f"checkpoint.weights={self.out / START}"]
        elif task.method != DISTIL:
            own += [f"checkpoint.weights={self.parent.folder}"]
        if task.method in PRUNES:
            own += ["train.keep_zeros=true"]
        if task.method == QAT:
            own += ["train.qat=8da4w"]
        if task.method == DISTIL and task.options["kl"]:
            own += [f"train.teacher={self.parent.folder}"]
        whole = task.method == DISTIL
        words = words_for(self.words, task.steps, task.overrides, own, whole_rate=whole, nproc=task.nproc)
        return training_of(words, task.nproc, self.out)

    @property
    def changes_start(self) -> bool:
        """Whether its training starts from other weights than the parent's or drawn ones."""
        method = self.task.method
        return method in PRUNES or (method == DISTIL and self.task.options["init"] == "teacher")

    def start(self) -> dict[str, Tensor]:
        """The weights before any training."""
        tensors = self.parent.tensors()
        if self.task.method == DISTIL:
            return even_layers(tensors, self.parent.config.model.num_layers)
        if self.task.method not in PRUNES:
            return tensors
        model = empty_model(self.parent.config, precision=Precision.float32)
        fill(model, tensors, str(self.parent.folder))
        count = self.task.options.get("calibration")  # windows of step 0, at which no training takes any
        tokens = None if count is None else self.corpus.batch(0, count, slice(None))[0]
        model.to(self.task.device)
        model.rope = model.rope.to(self.task.device)
        prune(model, self.task.options.get("sparsity"), None if tokens is None else tokens.to(self.task.device))
        return tensors | {name: layer.weight.cpu() for name, layer in prunable(model).items()}

    def prepare(self) -> None:
        """Make the new directory, with the weights from which its training starts, if they are its own."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            if self.task.steps and self.changes_start and not (self.out / START / WEIGHTS).is_file():
                (self.out / START).mkdir(exist_ok=True)
                save(self.start(), self.out / START / WEIGHTS, {})
        except OSError as error:
            raise Unwritable(self.out, error.strerror or error) from error

    def finish(self, run: Path | None, control: float | None) -> Record:
        """Write the weights, those of a trained `run` or the first ones; measure them; and write compression.json.
        `control`: the loss of the parent trained on by as many steps."""
        tensors = self.start() if run is None else open_trained(run).tensors()
        try:
            save(self.stored(tensors), self.out / WEIGHTS, self.metadata())
            write_whole(self.out / "config.yaml", self.yaml())
            record = self.measured(control)
            record.write(self.out)
            shutil.rmtree(self.out / START, ignore_errors=True)
            if run is not None:
                shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
        except OSError as error:
            raise Unwritable(self.out, error.strerror or error) from error
        return record

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the file."""
        model = empty_model(self.config, precision=Precision.float32)
        fill(model, dict(tensors), str(self.out))
        found = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
        if self.scheme in SCHEMES:
            scheme, names = SCHEMES[self.scheme], [*linear_layers(model)]
            scheme.apply(model, names)
            for name in names:
                parts = scheme.parts(model.get_submodule(name.removesuffix(".weight")))
                del found[name]
                found |= {f"{name}{suffix}": part for suffix, part in parts.items()}
        if self.task.method in PRUNES:
            for name in prunable(model):
                found |= {f"{name}{suffix}": part for suffix, part in sparse(found.pop(name)).items()}
        return found

    def measured(self, control: float | None) -> Record:
        """Measure the parent and the model whose weights are written."""
        task, device = self.task, self.task.device
        weights = sha256_of(self.out / WEIGHTS)
        does = work(self.config, self.corpus.sha256)
        made = Compressed(self.out, task.method, weights, does, self.words, self.config)
        parent = self.parent.model(device=device, precision=Precision.float32)
        sizes = (4 * sum(p.numel() for p in parent.parameters()), (self.out / WEIGHTS).stat().st_size)
        before, after = sides((parent, made.model(device=device)), sizes, self.config, self.corpus, task.tokens)
        training = self.training()
        return Record(
            method=task.method,
            options=task.options,
            before=before,
            after=after,
            control=control,
            parent={"run": self.parent.folder.as_posix(), "sha256": self.parent.sha256},
            training={} if training is None else {"nproc": training.nproc, "overrides": [*task.overrides]},
            tokens=num_validated(self.config, self.corpus),
            timing=timing(self.config, task.tokens),
            environment=_environment(device, task.method),
            work=does,
            weights_sha256=weights,
            command=shlex.join(["python", *command_words(TOOL), *words_of(task)]),
        )

    def metadata(self) -> dict[str, str]:
        """What the file of the weights says of itself."""
        return {
            "format": "pt",
            "strategy_lab": label(self.task.method, self.task.options),
            "parent_sha256": self.parent.sha256,
        }

    def yaml(self) -> str:
        return as_typed.yaml(cli.parse(cli.parser(TOOL, ""), [*self.words])[1])


class Unwritable(Reported):
    exit_code = EXIT_ENVIRONMENT

    def __init__(self, folder: Path, why: object) -> None:
        super().__init__(f"{folder} cannot be written ({why}): use out=FOLDER with a folder that can be written")


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a file of safetensors. Raises OSError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(str(error)) from error


def _environment(device: str, method: str) -> dict[str, Any]:
    package = SCHEMES[scheme].package if (scheme := method.removeprefix("qat_")) in SCHEMES else "safetensors"
    return {**environment(torch.device(device), "", 1), package: version(package)}
