"""Searches for tests: small models and worlds, on figures of a device that a test may change."""

import dataclasses
import math
from functools import cache

from tests.plans import plan_of
from train.command.planning import constants
from train.command.planning.footprint import footprint
from train.command.planning.search.layouts import Choices, Valid, meshes
from train.command.planning.search.pricer import Pricer, Task

BASE = "strategy=single hardware=h100_sxm precision=bf16"


@cache
def task(line, *, kept=20, **choices):
    """The task of a command line; keys of `train` that follow the sequence's length are set with it."""
    length = next((word.partition("=")[2] for word in line.split() if word.startswith("train.seq_len=")), "128")
    plan = plan_of(f"{BASE} {line} model.max_seq_len={length}")
    return Task(plan, plan.config.precision.value, constants.load(), Choices(**choices), kept)


def layouts(task):
    """Every valid layout."""
    valid = Valid(task.base, task.choices)
    return [layout for degrees in meshes(task.base) for group in valid.of_mesh(degrees) for layout in group]


def listed(tables, layout, task):
    """The layout with the layers of its stages, as a search prices it."""
    stages = layout.degrees[0] * layout.stages_per_rank
    return dataclasses.replace(layout, layers=tables.listed(task.base.config, stages))


def seconds():
    """Of every layout of a small search that fits, to the last bit."""
    one = task("model=llama_1b train.seq_len=1024 train.global_batch_size=16 nproc=8")
    found = [pair for degrees in meshes(one.base) for pair in Pricer(one).mesh((degrees, math.inf)).best]
    return " ".join(time.hex() for time, _ in found)


def check_memory(prices, job):
    """What other plans have found, and the early end of the search for the fullest rank, change nothing."""
    assert footprint(job, prices.tables.seen(job.plan)) == footprint(job)
    assert prices._fits(job) == (prices.missing(job) <= 0)
