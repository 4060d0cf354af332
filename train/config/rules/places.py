"""Rules of the paths that a run reads and writes, and of the name of its folder."""

from __future__ import annotations

import re

from train.config.groups.run import AUTO, NEVER
from train.config.plan import Plan
from train.config.rule import Finding, Rule

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # s3://, gs://, dbfs:/, file:///
NAME = re.compile(r"\w[\w.+-]{0,63}")


def _local_places(plan: Plan) -> Finding | None:
    config = plan.config
    places = {"metrics.dir": config.metrics.dir, "data.path": config.data.path}
    places |= {"checkpoint.weights": config.checkpoint.weights, "train.teacher": config.train.teacher}
    for key, value in places.items():
        if value is not None and ADDRESS.match(value):
            message = f"{key}={value} is an address, but only local files can be used"
            fix = (
                f"use a path on this machine, for example of mounted storage ({key}=./{value} if that is a file's name)"
            )
            return Finding(message, (), fix)
    return None


def _run_name(plan: Plan) -> Finding | None:
    name = plan.config.strategy.name
    if NAME.fullmatch(name):
        return None
    return Finding(
        f"strategy.name={name} cannot begin the name of a run's folder",
        (),
        "use at most 64 letters, digits and . + - _, with a letter, a digit or _ first",
    )


def _one_origin(plan: Plan) -> Finding | None:
    weights, resume = plan.config.checkpoint.weights, plan.config.checkpoint.resume
    if weights is None or resume in (AUTO, NEVER):
        return None
    message = f"checkpoint.weights={weights} and checkpoint.resume={resume} both say where the parameters come from"
    return Finding(message, ("checkpoint.weights=null", "checkpoint.resume=auto"))


RULES = (
    Rule("local_places", "the lab opens files only through the operating system", _local_places),
    Rule("one_origin", "a run starts from one set of parameters", _one_origin),
    Rule("run_name", "the name of a run's folder in metrics.dir begins with the strategy's name", _run_name),
)
