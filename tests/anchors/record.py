"""Every number of the record of a run of the lab, metrics.jsonl and summary.json, against the loop in loop.py.

A number that is held is taken out of the record. What is left in the end must be known to have no anchor, so that a new
number cannot stay unchecked.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.anchors import loop
from tests.anchors.differences import Differs, hold
from tests.anchors.loop import Expected
from train import main as lab
from train.command import cli
from train.config.schema import Config
from train.config.world import World
from train.data.corpus import load_corpus
from train.ranks.elastic.generation import Generation

BOUND, ARITHMETIC = 1e-9, 1e-12
WARMUP = 2  # steps that the medians leave out
# The time of day, the memory of the process, what saving took, and the circumstances of the run.
NO_ANCHOR = {"time", "memory/resident_gib", "memory_by_rank/resident_gib/rank_0", "omp_threads"}
NO_ANCHOR |= {"checkpoint/stall_ms", "checkpoint/save_s", "checkpoint/gib_per_s"}
FACTS = {"strategy", "degrees", "precision", "commit", "torch", "python", "device", "platform", "backend", "work_hash",
         "differs", "lossy", "energy_sensor"}  # fmt: skip

Record = dict[str, Any]


def parsed(text: Path, runs: Path) -> Config:
    """The config of the lab's run."""
    return cli.configured(loop.words(text, runs))


def run_lab(text: Path, runs: Path) -> tuple[list[Record], Record, float]:
    """Run train/main.py in this process. Returns the lines of metrics.jsonl, summary.json, and the seconds it took."""
    started = time.perf_counter()
    config, tree, _ = cli.parse(cli.parser("train/main.py", ""), loop.words(text, runs))
    cli.check(config, 1)
    lab.train(tree, load_corpus(config), Generation(config, World.single()), started)
    (path,) = runs.iterdir()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((path / "summary.json").read_text()), time.perf_counter() - started


def check_ten_steps(expected: Expected, text: Path, runs: Path) -> dict[str, float]:
    """Train with the lab in the folder `runs`. Returns the largest errors. Raises Differs if a number is wrong."""
    lines, summary, seconds = run_lab(text, runs)
    steps = [line for line in lines if "train/loss" in line]
    if [(line["step"], "train/loss" in line) for line in lines] != _order():
        raise Differs(f"metrics.jsonl has other lines: {[(line['step'], sorted(line)[:2]) for line in lines]}")
    times = {"the steps": sum(step["perf/step_ms"] for step in steps) / 1e3}
    times |= {key: summary.pop(key) for key in ("first_step_s", "total_s")}
    for what, spent in times.items():
        if not 0 < spent <= seconds:
            raise Differs(f"{what} took {spent} s by the record, and the run took {seconds} s")
    measured = {tag: [s[tag] for s in steps[WARMUP:]] for tag in ("perf/step_ms", "perf/tokens_per_s")}
    errors = {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "validation": 0.0}
    for line in lines:
        step = line.pop("step")
        if "validation/loss" in line:
            loss = line.pop("validation/loss")
            found = hold(f"validation/loss of step {step}", loss, expected.validations[step], BOUND)
            errors["validation"] = max(errors["validation"], found)
        else:
            for name, value in _of_step(line, expected, step).items():
                errors[name] = max(errors[name], value)
        _hold_all_taken(f"step {step}", line)
    errors["bigram"] = _summary(summary, expected, text, measured)
    return errors


def _order() -> list[tuple[int, bool]]:
    """The steps of the lines of metrics.jsonl, and whether each is a step and not an evaluation."""
    lines = []
    for step in range(1, loop.STEPS + 1):
        lines += [(step, True), *([(step, False)] if step % loop.EVAL_EVERY == 0 else [])]
    return lines


def _of_step(line: Record, expected: Expected, step: int) -> dict[str, float]:
    """Hold the numbers of a step."""
    where = f"of step {step}"
    errors = {
        "loss": hold(f"train/loss {where}", line.pop("train/loss"), expected.losses[step - 1], BOUND),
        "grad_norm": hold(f"train/grad_norm {where}", line.pop("train/grad_norm"), expected.norms[step - 1], BOUND),
        "lr": hold(f"train/lr {where}", line.pop("train/lr"), expected.rates[step - 1], ARITHMETIC),
    }
    tokens, seconds = loop.ROWS * loop.SEQ_LEN, line.pop("perf/step_ms") / 1e3
    for tag in ("perf/tokens_per_s", "perf/tokens_per_s_per_device"):  # one device
        hold(f"{tag} {where}", line.pop(tag), tokens / seconds, ARITHMETIC)
    tflops = expected.flops_per_token * tokens / seconds / 1e12
    tag = "perf/model_tflops_per_s_per_device"
    hold(f"{tag} {where}", line.pop(tag), tflops, ARITHMETIC)
    _memory(line, expected, "memory/{}_mib", "memory_by_rank/{}_mib/rank_0")
    return errors


def _memory(line: Record, expected: Expected, *tags: str) -> None:
    """A weight and its gradient are 8 bytes each, and so are AdamW's two moments; a tensor has a counter of 4 bytes."""
    weights = 8 * expected.num_parameters
    bytes_of = {"parameters": weights, "gradients": weights, "optimiser": 2 * weights + 4 * expected.num_tensors}
    for kind, size in bytes_of.items():
        for tag in tags:
            hold(tag.format(kind), line.pop(tag.format(kind)), size / 2**20, ARITHMETIC)


def _summary(summary: Record, expected: Expected, text: Path, measured: dict[str, list[float]]) -> float:
    """Hold the numbers of summary.json; the error of the bigram loss is returned."""
    times, speeds = measured["perf/step_ms"], measured["perf/tokens_per_s"]
    hold("the last training loss", summary.pop("train/loss"), expected.losses[-1], BOUND)
    hold("the last validation loss", summary.pop("validation/loss"), expected.validations[loop.STEPS], BOUND)
    numbers = {
        "steps": loop.STEPS,
        "warmup_steps": WARMUP,
        "measured_steps": loop.STEPS - WARMUP,
        "world_size": 1,
        "perf/step_ms": np.median(times),
        "perf/step_ms_p50": np.median(times),
        "perf/step_ms_p95": np.quantile(times, 0.95),
        "perf/tokens_per_s": np.median(speeds),
        "perf/tokens_per_s_per_device": np.median(speeds),
        # of 8 values the smallest and the largest: the median is outside in 2 of 2^8 cases, which is below 5 %
        "perf/tokens_per_s_ci95_low": min(speeds),
        "perf/tokens_per_s_ci95_high": max(speeds),
    }
    for tag, value in numbers.items():
        hold(tag, summary.pop(tag), float(value), ARITHMETIC)
    _memory(summary, expected, "memory/{}_mib")
    if summary.pop("corpus_sha256") != hashlib.sha256(text.read_bytes()).hexdigest():
        raise Differs("corpus_sha256 is not the hash of the text")
    bigram = hold("the bigram loss", summary.pop("bigram_validation_loss"), expected.bigram_loss, BOUND)
    _hold_all_taken("summary.json", summary)
    return bigram


def _hold_all_taken(where: str, left: Record) -> None:
    if rest := sorted(left.keys() - NO_ANCHOR - FACTS):
        raise Differs(f"{where} has values that are held against nothing: {', '.join(rest)}")
