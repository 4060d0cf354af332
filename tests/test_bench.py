"""scripts/bench_strategies.sh: its points are valid on 2, 4 and 8 GPUs, and its results show what was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.benching import points as bench_points
from scripts.benching import results as bench_results
from scripts.benching import torchtitan_peer
from train.command import cli, presets
from train.command.validate import validate
from train.config.plan import Plan
from train.config.problems import BadInput

REPO = Path(__file__).resolve().parent.parent
PARSER = cli.parser("test", "")


@pytest.mark.timeout(250)
@pytest.mark.parametrize("num_gpus", [2, pytest.param(4, marks=pytest.mark.slow), 8])
def test_every_point_keeps_every_rule(num_gpus):
    points = bench_points.points(num_gpus)
    assert len({(point.label, point.nproc) for point in points}) == len(points), "a point is known by these"
    for point in points:
        config, _, _ = cli.parse(PARSER, list(point.overrides))
        assert validate(config, point.nproc) == [], point
        plan = Plan(config, point.nproc)
        assert plan.num_microbatches >= plan.num_stages, point
        split = "eager" in point.label
        assert config.compile.enabled is not split
        assert (config.precision.value, config.train.steps) == ("bf16", 20)


def test_a_peer_that_is_missing_or_cannot_train_this_is_one_message(monkeypatch):
    config = cli.configured(["strategy=zero1", "model=tiny", "train.activation_checkpointing=full"])
    for found, code, said in (
        (None, 3, "torchtitan is not installed"),
        (object(), 2, "it needs a GPU; strategy=zero1 is not one of single, dp, fsdp"),
        (
            object(),
            2,
            "model.ffn_dim must be 512 with model.dim=128; it is asked for train.activation_checkpointing=none",
        ),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=found: found)
        with pytest.raises(BadInput, match=said) as caught:
            torchtitan_peer.check(config, torch.device("cpu"))
        assert caught.value.exit_code == code


def test_the_order_is_that_of_worth():
    labels = [point.label for point in bench_points.points(8)]
    assert labels[:9] == ["single", "dp", "fsdp", "tp", "pp 1f1b", "fsdp_tp", "3d", "ds_zero3, eager", "ds_zero2"]
    assert labels.index("pp zbv_zero_bubble, eager") > labels.index("pp 1f1b, eager") > labels.index("ep")
    two = bench_points.points(2)
    assert {point.label for point in two}.isdisjoint({"fsdp_tp", "3d", "hsdp", "tp_pp"})
    assert {point.nproc for point in two} == {1, 2}
    assert [p.nproc for p in bench_points.points(8) if p.label == "tp"] == [8, 1, 2, 4]


def test_a_dry_run_prints_every_line_and_finds_a_broken_rule(tmp_path):
    env = os.environ | {"DRY_RUN": "1", "NPROC": "2", "PYTHON": sys.executable, "RESULTS": str(tmp_path / "none")}
    small = ("model=tiny", "model.num_layers=4", "train.seq_len=64", "data=python_docs")
    command = [str(REPO / "scripts" / "bench_strategies.sh"), *small]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert run.returncode == 2, run.stderr
    lines = run.stdout.splitlines()
    started = [line for line in lines if line.startswith("torchrun")]
    assert len(started) == len(bench_points.points(2))
    assert all(line.partition("  #")[0].endswith(" ".join(small)) for line in started)
    assert sum(line.startswith("python scripts/verify.py nproc=2 strategy=") for line in lines) == 3
    (problem,) = [line for line in lines if line.startswith("ep on 2: ")]
    assert "model=moe_tiny" in problem
    assert not (tmp_path / "none").exists()


def test_the_proofs_keep_every_rule():
    for n in (2, 4, 8):
        script = f"source <(sed -n '/^proofs()/,/^}}/p' {REPO / 'scripts' / 'bench_strategies.sh'}); proofs {n}"
        out = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=20, check=True).stdout
        names = []
        for line in out.splitlines():
            strategies, *others = line.partition("\t")[2].split()
            for name in strategies.removeprefix("strategy=").split(","):
                config, _, _ = cli.parse(PARSER, [f"strategy={name}", *others])
                assert validate(config, n) == [], (name, n)
                names.append(name)
        if n == 8:  # all but one device, and what needs 16
            assert sorted([*names, "single", "4d"]) == presets.names("strategy")


def test_a_row_of_a_run_that_was_stopped(tmp_path):
    run = tmp_path / "runs" / "tp-tp2-ws2-0"
    run.mkdir(parents=True)
    (tmp_path / "log").write_text("torch.OutOfMemoryError: CUDA out of memory\n")
    steps = [
        {"step": i, "train/loss": 1.0, "perf/tokens_per_s_per_device": 100.0 if i > 5 else 1.0, "perf/mfu_pct": 40.0,
         "memory/peak_allocated_gib": 30.0 - i, "memory_by_rank/parameters_mib/rank_0": 1.0,
         "memory/parameters_mib": 2.0, "comm/tp/all_gather_mib": 3.0, "comm/tp/reduce_scatter_mib": 4.0}
        for i in range(1, 9)
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps) + '{"step": 9, "tra')
    row = bench_results.row(bench_points.Point("tp", 2, ("strategy=tp",)), "stopped after 60 s", 61, tmp_path)
    assert (row["steps"], row["steps_measured"], row["memory/peak_allocated_gib"]) == (8, 3, 24.0)
    assert "why" not in row, "it was stopped, whatever torchrun says of that"
    failed = bench_results.row(bench_points.Point("tp", 2, ()), "failed (1)", 61, tmp_path)
    assert "out of memory" in failed["why"]
    line = next(line for line in bench_results.table([row]).splitlines() if line.startswith("| tp |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == [
        "tp", "2", "100", "40.0", "-", "24.0", "parameters 2", "tp 7", "-", "-", "3 (stopped after 60 s)",
    ]  # fmt: skip


def test_efficiency_is_over_one_gpu_and_the_newest_run_counts():
    speeds = {("single", 1): 50.0, ("dp", 1): 49.0, ("dp", 2): 40.0}
    ok = {"status": "ok", "steps_measured": 15}
    rows = [{"label": label, "nproc": n, **ok, bench_results.SPEED: v} for (label, n), v in speeds.items()]
    failed = {"label": "cp ring", "nproc": 2, "status": "failed (1)"}
    text = bench_results.table([rows[0] | {bench_results.SPEED: 1.0}, *rows, failed])
    assert "| dp | 98.0 | 80.0 |" in text
    assert "| tp |" not in text, "what was not run is not in a table of what was measured"
    assert bench_results.scaling({("dp", 2): rows[2]}) == [], "nothing to compare with"
    assert text.count("| single | 1 |") == 1
    assert "| cp ring |" not in text and "No step was measured of cp ring on 2 (failed (1))." in text


def test_a_proof_says_what_it_found():
    log = """
fsdp on 2 process(es): dp_shard 2
  loss          loss    0.0e+00   1e-09  ok
  equals one device

tp on 2 process(es): tp 2
  DIFFERS from one device in loss
"""
    assert bench_results.verdicts(log) == {"fsdp": "equals one device", "tp": "DIFFERS from one device in loss"}
