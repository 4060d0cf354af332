"""`launch.explain` describes a run before it starts. tests/test_ledger.py compares its figures with those of a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.command import cli
from train.config.plan import Plan
from train.config.shapes import coordinates
from train.config.strategy import MESH_AXES, resolve_degrees
from train.model.transformer import Transformer, dtypes
from train.record.drawing import draw_mesh, ranges
from train.strategies.memory import parameter_shapes

REPO = Path(__file__).resolve().parent.parent


def explain(*argv):
    env = os.environ | {"PYTHONPATH": str(REPO)}
    command = [sys.executable, "-m", "launch.explain", *argv]
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)


def plan_of(nproc, *overrides):
    return Plan(cli.parse(cli.parser("test", ""), list(overrides))[0], nproc)


def test_mesh_holdings_and_traffic():
    run = explain("strategy=tp_pp", "nproc=4")
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert ["pp", "\\", "tp", "0", "1"] in lines and ["1", "2", "3"] in lines
    assert ["0-1", "embed,", "layers", "0-3", "0.00144", "0.00144", "0.00288", "0.00575", "0", "25.0", "%"] in lines
    # 4 gathers a layer, 4 layers a stage, 8 microbatches, each of 128 x 128 float32
    assert ["tp", "all_gather", "128", "call(s)", "8.000000", "MiB", "each", "layer:", "4", "of", "BTD"] in lines
    assert ["pp", "send", "8", "call(s)", "0.250000", "MiB", "activations", "to", "the", "next", "stage"] in lines


def test_experts_and_what_routers_decide():
    run = explain("strategy=ep", "model=moe_tiny", "nproc=4")
    assert run.returncode == 0, run.stderr
    assert "embed, layers 0-7, experts 2-3, norm+head" in run.stdout
    lines = [line.split() for line in run.stdout.splitlines()]
    # forward and backward of 8 layers, 2 microbatches: 2 experts' rows of 128 tokens, 128 wide, float32
    assert any(line[:5] == ["ep", "all_to_all", "32", "call(s)", "4.000000"] for line in lines)
    assert any(line[:6] == ["ep", "all_to_all", "32", "call(s)", "~", "4.000000"] for line in lines)


def test_problems_and_what_can_still_be_said():
    run = explain("strategy=fsdp_tp", "nproc=6")
    assert run.returncode == 2, run.stderr
    assert "dp_shard \\ tp" in run.stdout and "held between steps" in run.stdout and "sent by" not in run.stdout
    assert "train.global_batch_size=8 is not divisible" in run.stdout
    run = explain("strategy=tp", "nproc=4", "strategy.tp=3", "data=text")
    assert run.returncode == 2, run.stderr
    assert "held" not in run.stdout
    assert "model.num_heads=8 is not divisible" in run.stdout and "data=text needs a path" in run.stdout


def test_bad_words_are_answered_as_everywhere():
    run = explain("strategy=foo")
    assert (run.returncode, run.stdout) == (2, "") and "does not name a preset" in run.stderr


def test_it_does_not_load_torch():
    script = (
        "import sys; sys.argv[1:] = ['strategy=3d', 'nproc=8', 'train.global_batch_size=16']\n"
        "from launch.explain import main; main(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("options", [(), ("model.tie_embeddings=true",), ("model=llama_8b",), ("model=moe_tiny",)])
def test_shapes_are_the_models(options):
    plan = plan_of(1, "strategy=single", *options)
    model = Transformer(plan.config.model, **dtypes(plan.config.precision))
    assert parameter_shapes(plan, 0) == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_ranks_by_axis():
    degrees = resolve_degrees({"pp": 2, "dp_shard": 2, "tp": 2}, 8)
    assert draw_mesh(degrees).splitlines()[-1].split() == ["1", "6", "7"]
    assert draw_mesh(dict.fromkeys(MESH_AXES, 1)) == "rank 0 alone"
    place = coordinates(plan_of(8, "strategy=3d"), 6)
    assert (place["pp"], place["dp_shard"], place["tp"]) == (1, 1, 0)
    assert ranges([0, 1, 2, 5]) == "0-2, 5" and ranges([0, 2, 4, 6]) == "0, 2 … 6"
