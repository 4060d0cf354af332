"""Rules of where a run reads and writes: folders of this machine, and a run's name within its folder."""

from __future__ import annotations

import re

from train.config.plan import Plan
from train.config.rule import Finding, Rule

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # s3://, gs://, dbfs:/, file:///
NAME = re.compile(r"\w[\w.+-]{0,63}")


def _local_places(plan: Plan) -> Finding | None:
    config = plan.config
    for key, value in (("metrics.dir", config.metrics.dir), ("data.path", config.data.path)):
        if value is not None and ADDRESS.match(value):
            message = f"{key}={value} is an address, but only files of this machine are used"
            fix = f"use a path of this machine, where storage may be mounted ({key}=./{value} if that is a file's name)"
            return Finding(message, (), fix)
    return None


def _run_name(plan: Plan) -> Finding | None:
    name = plan.config.strategy.name
    if NAME.fullmatch(name):
        return None
    return Finding(
        f"strategy.name={name} cannot begin the name of a run's folder",
        (),
        "use up to 64 letters, digits, or . _ + - after the first",
    )


RULES = (
    Rule("local_places", "The lab opens files with the operating system alone.", _local_places),
    Rule("run_name", "A run's folder is in metrics.dir and begins with its strategy's name.", _run_name),
)
