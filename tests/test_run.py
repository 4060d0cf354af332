"""A complete run, started by the command that a user types: what it logs, where, and that the figures are right."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import SESSION_END_INFO_TAG

from tests.running import job, run_jobs
from train.command import cli
from train.config.flops import flops_per_token
from train.model.transformer import Transformer, dtypes
from train.record.tags import shown_as
from train.strategies.pipeline.placement import layers_of_stages, layers_per_stage

REPO = Path(__file__).resolve().parent.parent
MiB = 2**20
EVERY_STEP = {
    "train/loss", "train/grad_norm", "train/lr", "perf/step_ms", "perf/tokens_per_s", "perf/tokens_per_s_per_device",
    "perf/model_tflops_per_s_per_device", "memory/parameters_mib", "memory/gradients_mib", "memory/optimiser_mib",
}  # fmt: skip


def launch(folder, nproc, *overrides):
    command = [sys.executable, "-m", "launch.local", f"nproc={nproc}", "runtime.device=cpu", *overrides]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=170)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith("torchrun --standalone")
    (path,) = (folder / "runs").iterdir()
    return run.stdout, path


def steps_of(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line], [line for line in lines if "validation/loss" in line]


def held_by_rank(strategy, size):
    """The bytes of float32 parameters that each of four ranks should have, counted from the shapes."""
    model_config = cli.parse(cli.parser("test", ""), [])[0].model
    shapes = {n: p.shape for n, p in Transformer(model_config, **dtypes(cli.Config().precision)).named_parameters()}
    if strategy == "dp":
        return [4 * sum(s.numel() for s in shapes.values())] * size
    if strategy == "fsdp":  # rows of dimension 0, in chunks of the same size; all divide here
        return [4 * sum(s.numel() // size for s in shapes.values())] * size
    if strategy == "tp":  # matrices split, norms whole
        return [4 * sum(s.numel() // (size if len(s) > 1 else 1) for s in shapes.values())] * size
    held, layers = [], layers_of_stages(layers_per_stage(model_config, 16, size))
    for rank in range(size):
        prefixes = tuple(f"layers.{i}." for i in layers[rank])
        ends = ("embed.",) if rank == 0 else ("norm.", "head.") if rank == size - 1 else ()
        held.append(4 * sum(s.numel() for n, s in shapes.items() if n.startswith(prefixes + ends)))
    return held


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """The bytes of state by kind on each of four ranks, by strategy, without a run that logs them."""
    words = ["precision=float32", "train.seq_len=16", "train.micro_batch_size=1", "runtime.device=cpu"]
    jobs = {name: job(f"CHECK:held {name}", [*words, f"strategy={name}"]) for name in ("tp", "dp", "fsdp")}
    found = run_jobs(tmp_path_factory.mktemp("held"), [*jobs.values()], size=4, timeout_s=150)
    return {name: found[one.name] for name, one in jobs.items()}


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("strategy", ["tp", "dp", "fsdp"])
def test_bytes_of_state_equal_the_count_from_shapes(strategy, held):
    assert "error" not in held[strategy], held[strategy]["error"]
    are_counted(strategy, held[strategy]["held"])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_logged_bytes_equal_the_count_from_shapes(tmp_path):
    """Of pp, as its ranks hold different numbers of bytes."""
    _, path = launch(tmp_path, 4, "strategy=pp", "train.steps=2", "train.seq_len=16", "train.eval_batches=1")
    step = steps_of(path)[0][-1]
    kinds = ("parameters", "gradients", "optimiser")
    logged = [{kind: step[f"memory_by_rank/{kind}_mib/rank_{rank}"] * MiB for kind in kinds} for rank in range(4)]
    are_counted("pp", logged)
    assert step["memory/parameters_mib"] * MiB == max(held_by_rank("pp", 4))


def are_counted(strategy, held):
    expected = held_by_rank(strategy, 4)
    for found, size in zip(held, expected, strict=True):
        assert found["parameters"] == size
        assert found["gradients"] == size
        assert 0 <= found["optimiser"] - 2 * size <= 8 * 80, "two moments, and a step counter per tensor"
    whole = held_by_rank("dp", 1)[0]
    if strategy in ("fsdp", "tp"):
        assert max(expected) <= 0.26 * whole
    if strategy == "pp":
        assert sum(expected) == whole


@pytest.mark.timeout(200)
def test_a_run_leaves_what_it_says(tmp_path):
    words = ("strategy=tp", "train.steps=6", "train.eval_every=3", "train.seq_len=32", "train.micro_batch_size=4")
    out, path = launch(tmp_path, 2, *words)
    assert re.fullmatch(r"tp-tp2-ws2-[0-9a-f]{6}", path.name)
    steps, validations = steps_of(path)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in validations] == [3, 6]
    for line in steps:
        assert line.keys() >= EVERY_STEP | {"memory/resident_gib", "memory_by_rank/resident_gib/rank_1"}
        assert not any("mfu" in tag or "allocated" in tag for tag in line), "made up on a CPU"
        tokens_per_s = 8 * 32 / line["perf/step_ms"] * 1e3
        assert line["perf/tokens_per_s"] == pytest.approx(tokens_per_s)
        assert line["perf/tokens_per_s_per_device"] == pytest.approx(tokens_per_s / 2)
        flops = flops_per_token(cli.parse(cli.parser("test", ""), [])[0].model, 32)
        assert line["perf/model_tflops_per_s_per_device"] == pytest.approx(tokens_per_s * flops / 2e12)
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]

    summary = json.loads((path / "summary.json").read_text())
    assert summary["validation/loss"] == validations[-1]["validation/loss"]
    assert summary["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{64}", summary["corpus_sha256"])
    assert "strategy:" in (path / "config.yaml").read_text()

    events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    logged = {tag for line in steps + validations for tag in line} - {"step", "time"}
    results = {tag for tag in events.Tags()["scalars"] if tag.startswith("result/")}
    assert set(events.Tags()["scalars"]) - results == {shown_as(tag) for tag in logged}
    for tag in events.Tags()["scalars"]:
        steps_written = [event.step for event in events.Scalars(tag)]
        assert steps_written == sorted(set(steps_written)), f"{tag} has two values at a step, or is out of order"
    ends = {tag: events.Scalars(tag)[-1].value for tag in results}
    assert ends["result/step_ms"] == pytest.approx(summary["perf/step_ms"])
    assert ends["result/tokens_per_s"] == pytest.approx(summary["perf/tokens_per_s"])
    assert ends["result/validation_loss"] == pytest.approx(summary["validation/loss"])
    assert SESSION_END_INFO_TAG in events.summary_metadata, "not told that it is complete"
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    told = {"config", "environment", "mesh", "custom_scalars__config__"}
    assert {tag.split("/")[0] for tag in events.Tags()["tensors"]} == told
    assert len(list(path.glob("events.out.*"))) == 1

    assert "tensorboard --logdir runs" in out
    assert out.count("step 6/6  loss") == 1
    assert "of a byte-bigram model" in out


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_second_start_gets_a_directory_of_its_own(tmp_path):
    arguments = ("strategy=single", "train.steps=1", "train.seq_len=16", "model.num_layers=1", "train.eval_batches=1")
    _, first = launch(tmp_path, 1, *arguments)
    losses = steps_of(first)[0][0]["train/loss"]
    command = [sys.executable, str(REPO / "train" / "main.py"), "runtime.device=cpu", *arguments]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=100)
    second = tmp_path / "runs" / f"{first.name}-2"
    assert steps_of(second)[0][0]["train/loss"] == losses
    assert math.isfinite(losses)
