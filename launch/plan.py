"""Find the fastest layout before you rent: python -m launch.plan model=llama_70b hardware=h100_sxm nproc=512

Prices every valid layout of a model on so many devices, by closed forms: mesh, ZeRO's stage, a pipeline's schedule and
stages, micro batch and recomputation. It prints the best that fit in memory, each with its speed and an interval, the
parts of a step, memory by kind, and what a training takes. Nothing is started, and no GPU is needed.

Takes every override that train/main.py takes, but no strategy, and the options that --help shows. The model, the global
batch and the sequence length are never changed; train.micro_batch_size and train.activation_checkpointing are chosen
unless they are given. precision=bf16,fp8 searches several precisions of the matrix products. hardware=NAME names the
device; without it, it is this machine's. If the config is wrong or no layout fits, the exit code is 2.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from launch.planning.answer import LAB, Answer, lines, values
from launch.planning.check import check
from launch.start.device import device_here
from train.command import cli, options
from train.command.planning import auto, constants, intervals
from train.command.planning.job import NEXT_PRECISION
from train.command.planning.search.pricer import Priced, Task
from train.command.planning.search.refusals import check_config, refused
from train.command.planning.search.search import OnProgress, Outcome, search
from train.command.process.exits import leave_on_interrupt, reported_once
from train.command.process.streams import lasting
from train.config.plain_json import dumps
from train.config.plan import Plan
from train.config.problems import BadInput, Problem
from train.config.schema import Precision
from train.config.world import World
from train.strategies.memory import num_parameters

# Where the batch is not given: 4 Mi tokens in sequences of 4,096, with which the training of Llama 3 405B began
# (arXiv:2407.21783, section 3.4.1). Small models keep the batch of the config.
SEQ_LEN, BATCH, USUAL = "train.seq_len", "train.global_batch_size", (4096, 4 * 2**20)
LARGE = 500_000_000  # parameters
PRECISIONS = (*NEXT_PRECISION, "float64")
MOST_WORKERS = 8


@dataclass(frozen=True)
class Asked:
    """The command line. `words`: its overrides, with the batch that is planned for. `products`: the precisions of the
    matrix products; `base` is in the first of them."""

    words: tuple[str, ...]
    base: Plan
    products: tuple[str, ...]
    top: int
    tokens: float
    price: float | None
    check: int
    as_json: bool
    notes: tuple[str, ...]


def main() -> None:
    leave_on_interrupt()
    with reported_once(World.single()):
        asked = read(sys.argv[1:])
        answer = answered(asked)
        print(dumps(values(answer), indent=2) if asked.as_json else "\n".join(lines(answer)), flush=True)
        for line in check(answer, asked.check) if asked.check else ():
            print(line, flush=True)


def read(argv: Sequence[str]) -> Asked:
    """Read the command line. Raises BadInput."""
    argv = [*argv]
    nproc, top = options.NPROC.pop(argv), options.TOP.pop(argv)
    tokens, price, checked = options.TOKENS.pop(argv), options.PRICE.pop(argv), options.CHECK.pop(argv)
    parser = cli.parser(options.PLAN, __doc__ or "")
    parser.add_argument("--json", action="store_true")
    products, overrides = _products(argv)
    auto.refuse_strategy(overrides, options.PLAN)
    words, notes = _with_batch(parser, overrides)
    config = auto.standing(words)
    hardware, calibrated = auto.figures(config, device_here(config, nproc), nproc)
    if not calibrated and config.hardware.name == auto.AUTO:
        notes = (*notes, f"hardware={hardware.name} stands for this machine (uncalibrated: run scripts/matmul.py)")
    train = config.train
    tokens = tokens or float(train.steps * train.global_batch_size * train.seq_len)
    base = Plan(replace(config, hardware=hardware), nproc)
    names = products or (config.precision.value,)
    return Asked(tuple(words), base, names, top, tokens, price, checked, "--json" in argv, notes)


def in_precision(base: Plan, products: str) -> Plan:
    """The plan in the precision in which messages and memory are counted if matrix products are computed in this one:
    the same, or bf16 if the lab does not train every layout in it."""
    precision = Precision(products) if products in LAB else Precision.bf16
    return Plan(replace(base.config, precision=precision), base.world_size)


def _products(argv: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """(The precisions of `precision=`, the other words with a precision in which the lab trains every layout)."""
    given = [word for word in argv if word.startswith("precision=")]
    names = tuple(dict.fromkeys(given[-1].partition("=")[2].split(","))) if given else ()
    if unknown := [name for name in names if name not in PRECISIONS]:
        message = f"precision={','.join(names)}: {', '.join(unknown) or 'nothing'} is not a precision"
        raise BadInput(Problem("precision", message, f"use one or several of {', '.join(PRECISIONS)}"))
    others = [word for word in argv if word not in given]
    return names, [*others, *([f"precision={names[0] if names[0] in LAB else 'bf16'}"] if names else [])]


def _with_batch(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words, with the usual batch where a large model's is not given, and a line that says so. Answers --help."""
    config, _, args = cli.parse(parser, [*argv])
    keys = {word.partition("=")[0] for word in args.overrides}
    if {SEQ_LEN, BATCH} <= keys or num_parameters(config.model)[0] < LARGE:
        return args.overrides, ()
    added = [] if SEQ_LEN in keys else [f"{SEQ_LEN}={USUAL[0]}"]
    length = config.train.seq_len if SEQ_LEN in keys else USUAL[0]
    added += [] if BATCH in keys else [f"{BATCH}={max(USUAL[1] // length, 1)}"]
    return [*args.overrides, *added], (f"not given, so planned with {' '.join(added)}, as Llama 3 405B began",)


def answered(asked: Asked) -> Answer:
    """The search of each precision. Raises BadInput if no layout is valid or fits."""
    check_config(asked.base)
    started = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    best: list[Priced] = []
    tasks: list[Task] = []
    for name in asked.products:
        choices = auto.choices_of(asked.words, asked.base.config)
        tasks.append(Task(in_precision(asked.base, name), name, constants.load(), choices))
        outcomes[name] = search(tasks[-1], workers=_workers(asked.base), on_progress=_progress(name))
        best += outcomes[name].best
    if not best:
        raise BadInput(refused(tasks[0], outcomes[asked.products[0]]))
    best.sort(key=_seconds)
    seconds = time.monotonic() - started
    shared = (asked.tokens, asked.price, seconds, asked.top, asked.words, asked.notes)
    return Answer(asked.base, outcomes, tuple(best), intervals.load(), *shared)


def _seconds(priced: Priced) -> float:
    return priced.seconds


def _workers(base: Plan) -> int:
    """Processes: one for small worlds, whose search takes less than starting more."""
    return 1 if base.world_size <= 16 else min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def _progress(name: str) -> OnProgress:
    """A line that is updated in place on a terminal; nothing elsewhere."""

    def show(done: int, total: int) -> None:
        text = f"{name}: {done:,} of {total:,} meshes priced"
        end = "\r" + " " * len(text) + "\r" if done == total else ""
        print(f"\r{text}{end}", end="", file=sys.stderr, flush=True)

    return show if sys.stderr.isatty() else lambda done, total: None


if __name__ == "__main__":
    lasting()
    main()
