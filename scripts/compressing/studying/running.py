"""Runs a study: trains what its methods need, measures every model alone, and keeps a line for each result."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from typing import Any

import torch

from scripts.compressing import table
from scripts.compressing.control import check_device, needs_control
from scripts.compressing.making import Making
from scripts.compressing.measure import measured_again
from scripts.compressing.methods.schemes import SCHEMES
from scripts.compressing.opened import open_model
from scripts.compressing.record import Record, is_compressed, label
from scripts.compressing.studying import bars, kernels
from scripts.compressing.studying.plan import PARENT, Study
from scripts.compressing.studying.trainings import train, train_parents
from scripts.compressing.words import PRUNE_2_4, PRUNES, TRAINED_ON, Task
from train.checkpoint.whole.trained import Opened

Row = dict[str, Any]


def run(study: Study) -> None:
    """Do what is not done, and print the table and the bars."""
    for device in {study.device, study.speeds or study.device}:
        check_device(device)
    rows = Rows(study)
    parents = {seed: open_model(path) for seed, path in train_parents(study).items()}
    every = [
        (seed, making_for(study, task, parent, seed))
        for seed, parent in parents.items()
        for task in study.tasks(parent.folder)
        if has_package(study, task.method)
    ]
    trainings = []
    for seed, making in every:
        if is_compressed(making.out):
            continue
        making.check()
        making.prepare()
        if (training := making.training()) is not None and training.finished() is None:
            trainings.append((f"{seed} {label(making.task.method, making.task.options)}", training))
    train(study, trainings)
    controls: dict[int, float] = {}
    for seed, making in every:
        record = finish(study, making, controls.get(seed) if needs_control(making.task) else None)
        rows.add(seed, PARENT, record)
        more(study, rows, seed, making, record)
        if making.task.method == TRAINED_ON:
            controls[seed] = record.after.loss
            task = Task(making.out, bars.POST_TRAINING, device=study.device)
            other = making_for(study, task, open_model(making.out), seed, TRAINED_ON)
            other.prepare()
            rows.add(seed, TRAINED_ON, finish(study, other, None))
    table.to_terminal(table.tables([Record.of(row["record"]) for row in rows.read() if row["of"] == PARENT]))
    print("\n".join(bars.verdicts(rows.read())))


def making_for(study: Study, task: Task, parent: Opened, seed: int, of: str = PARENT) -> Making:
    slug = label(task.method, task.options).replace(" ", "-").replace("=", "-")
    out = study.folder / f"{study.model}-{seed}" / (slug if of == PARENT else f"{slug}-of-{of}")
    return Making(task, parent, out)


def has_package(study: Study, method: str) -> bool:
    scheme = SCHEMES.get(method)
    if scheme is None or find_spec(scheme.package) is not None:
        return True
    study.say(f"{method} is left out: {scheme.package} is not installed here")
    return False


def finish(study: Study, making: Making, control: float | None) -> Record:
    """The record of a task whose training, if it has one, is done."""
    if is_compressed(making.out):
        return Record.read(making.out)
    training = making.training()
    record = making.finish(None if training is None else training.finished(), control)
    if study.device != "cpu":
        torch.accelerator.empty_cache()  # the next two models may be larger
    study.say(f"{making.out.relative_to(study.folder)}: loss {record.after.loss:.4f} ({record.cost_pct:+.2f} %)")
    return record


def more(study: Study, rows: Rows, seed: int, making: Making, record: Record) -> None:
    """Measure speeds on the second device, except of models that compute there as their parents do; and those of 2:4
    kernels on the first, if it has them."""
    same = record.method in (*PRUNES, TRAINED_ON)
    if study.speeds is not None and not same and not rows.has(seed, PARENT, record, study.speeds):
        models = [one.model(device=study.speeds) for one in (making.parent, open_model(making.out))]
        again = measured_again(record, models, making.config, making.corpus, making.task.tokens)
        rows.add(seed, PARENT, again)
        study.say(f"{making.out.relative_to(study.folder)}: speeds on {study.speeds}")
    if record.method == PRUNE_2_4 and study.device == "cuda" and not rows.kernels(seed, record):
        row = {"seed": seed, "of": "2:4 kernels", "label": record.label}
        try:
            found = kernels.speeds(open_model(making.out).model(device="cuda"), making.config)
            rows.write(row | dataclasses.asdict(found))
            study.say(f"{record.label}: {found}")
        except RuntimeError as error:  # a GPU without such kernels, or a size that they do not take
            rows.write(row | {"error": str(error)})
            study.say(f"{record.label}: no 2:4 kernels: {error}")


class Rows:
    """The file with the results, a line for each. A line is added once."""

    def __init__(self, study: Study) -> None:
        self.study, self.file = study, study.folder / "rows.jsonl"

    def read(self) -> list[Row]:
        """The rows of the study's model."""
        if not self.file.exists():
            return []
        found = [json.loads(line) for line in self.file.read_text().splitlines() if line.strip()]
        return [row for row in found if row["model"] == self.study.model]

    def write(self, row: Row) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"model": self.study.model, **row}) + "\n")

    def has(self, seed: int, of: str, record: Record, device: str) -> bool:
        wanted = (seed, of, record.label, device)
        return any((row["seed"], row["of"], row["label"], row.get("on")) == wanted for row in self.read())

    def kernels(self, seed: int, record: Record) -> bool:
        return any((r["seed"], r["of"], r["label"]) == (seed, "2:4 kernels", record.label) for r in self.read())

    def add(self, seed: int, of: str, record: Record) -> None:
        device = "cpu" if record.environment["device"] == "cpu" else "cuda"
        if not self.has(seed, of, record, device):
            self.write({"seed": seed, "of": of, "label": record.label, "on": device, "record": record.values()})
