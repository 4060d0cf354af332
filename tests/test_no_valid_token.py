"""A step without a token to predict has no loss, and only numbers that JSON supports are written."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scripts.comparing.gate import difference
from scripts.comparing.runs import Run, read_run
from train.command import cli
from train.config import plain_json
from train.config.strategy import StepResult, TrainStep
from train.config.world import World
from train.data.corpus import load_corpus
from train.data.tokens import InMemory
from train.measure.metrics import Metrics
from train.measure.sampling import Sampled
from train.ranks.batches import Batches
from train.ranks.side_group import SideGroup
from train.record.printed import Terminal
from train.record.sinks import JsonLines, TensorBoard

REPO = Path(__file__).resolve().parent.parent


class Still:
    on_gradients = None

    def evaluate(self, tokens, targets):
        return torch.tensor(0.0), torch.tensor(0)

    def state_bytes(self):
        return {"parameters": 1, "gradients": 1, "optimiser": 1}


class NoTargets:
    num_validation = 1

    def validation(self, index):
        return None, None


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def strict(text):
    return json.loads(text, parse_constant=no_constant)


def test_json_has_no_nan():
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan}, "d": "NaN", "e": None, "f": True}
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN", "e": None, "f": True}
    assert strict(plain_json.dumps(value)) == strict(plain_json.dumps(value, indent=2)) == expected


def test_a_step_without_a_valid_token_says_so_everywhere(tmp_path, capsys):
    config = cli.parse(cli.parser("test", ""), ["train.steps=3", "train.on_nonfinite=ignore"])[0]
    sinks = [JsonLines(tmp_path), Terminal(3), TensorBoard(tmp_path, {})]
    metrics = Metrics(config, SideGroup(World.single()), torch.device("cpu"), cast(TrainStep, Still()), sinks)
    for step, (loss, any_target) in enumerate([(2.5, True), (0.0, False), (math.nan, True)], start=1):
        result = StepResult(torch.tensor(loss), torch.tensor(1.0))
        metrics.log(step, result, 1e-3, Sampled(), any_target=any_target)
    metrics.validate(3, cast(Batches, NoTargets()))
    metrics.close()
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("train/loss") for line in lines] == [2.5, None, None, None]
    assert [line.get("train/valid_tokens") for line in lines] == [None, 0, None, None]
    assert lines[-1]["validation/loss"] is None
    out = capsys.readouterr().out
    assert "step 2/3  no valid token  grad norm 1.000" in out and "validation no valid token" in out
    assert "loss nan" in out and "0.0000" not in out
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 3]
    assert [event.value for event in events.Scalars("result/train_loss")] == [2.5, 2.5], "a result is a number"


def test_runs_are_compared_where_there_is_a_loss():
    def run(*losses):
        """`empty`: a step without a valid token. None: a loss that is not a finite number."""
        steps = [{"step": i, "train/loss": None if loss == "empty" else loss} for i, loss in enumerate(losses)]
        for step, loss in zip(steps, losses, strict=True):
            step |= {"train/valid_tokens": 0.0} if loss == "empty" else {}
        return Run(Path("x"), steps=steps)

    assert difference(run(2.0, "empty", 1.0), run(2.0, "empty", 1.0)) == 0
    assert difference(run(2.0, "empty", 1.5), run(2.0, "empty", 1.0)) == 0.5
    assert difference(run(2.0, "empty"), run(2.0, 1.0)) == math.inf
    assert difference(run(2.0, None), run(2.0, None)) == math.inf
    assert difference(run("empty"), run("empty")) is None


def test_whether_any_target_of_the_global_batch_carries_loss(tmp_path):
    text = np.full(40_000, ord("a"), np.uint8)
    text[::900] = ord("b")
    config = cli.parse(cli.parser("test", ""), ["data.ignore_token=97", "train.seq_len=32"])[0]
    corpus = dataclasses.replace(load_corpus(config), training=InMemory(text))
    seen = set()
    for step in range(60):
        expected = bool((corpus.batch(step, 2, slice(0, 2))[1] >= 0).any())
        assert corpus.any_target(step, 2) is expected
        seen.add(expected)
    assert seen == {True, False}
    assert dataclasses.replace(corpus, ignore_token=None).any_target(1, 2)


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_run_with_empty_steps(tmp_path):
    (tmp_path / "text.txt").write_text(("a" * 60 + "b") * 400)
    words = [
        *("strategy=dp", "nproc=2", "data=text", "data.path=text.txt", "data.ignore_token=97", "train.seq_len=16"),
        *("train.global_batch_size=2", "train.micro_batch_size=1", "train.steps=12", "model.num_layers=1"),
        *("metrics.tensorboard=false", "runtime.device=cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "launch.local", *words]
    out = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=140
    ).stdout
    assert "data text: text.txt: 24,400 bytes\n  24,400 tokens: 21,960 to train on, 2,440 held out" in out
    assert "model tiny: 250,240 parameters, precision float32" in out
    assert "batch: 2 sequences of 16 tokens, 32 tokens a step" in out
    assert "no valid token" in out
    (path,) = (tmp_path / "runs").iterdir()
    strict((path / "summary.json").read_text())
    losses = [step["train/loss"] for step in read_run(path).steps]
    assert len(losses) == 12 and None in losses and any(losses)
    assert 0.0 not in losses
