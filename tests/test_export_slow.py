"""Exports that take minutes to compile: two layers of a run on four processes, with tensor and pipeline parallelism."""

import importlib.util
import subprocess
import sys

import pytest

from scripts import export as tool
from scripts.exporting import artefact
from scripts.exporting.running.opened import open_runner
from tests.saved_runs import ENV
from train.checkpoint.whole.trained import open_trained

WORDS = [  # a wide feed-forward, so that the embedding, which stays float32, is as small a part as in eight layers
    *("strategy=tp_pp", "nproc=4", "runtime.device=cpu", "model.num_layers=2", "model.ffn_dim=704", "train.seq_len=48"),
    *("train.eval_batches=1", "train.global_batch_size=2", "metrics.tensorboard=false", "metrics.profile_every=0"),
    *("train.steps=3", "checkpoint.every=3"),
]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
needs_executorch = pytest.mark.skipif(importlib.util.find_spec("executorch") is None, reason="needs executorch")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tp_pp")
    command = [sys.executable, "-m", "launch.local", *WORDS]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "runs").iterdir()
    return path


def exported(run, to, quant):
    folder = run / "exports" / f"{to}-{quant}"
    if not folder.exists():
        assert tool.main([str(run), f"to={to}", f"quant={quant}"]) == 0
    return artefact.read(folder)


@needs_executorch
@pytest.mark.filterwarnings("ignore")  # of the compiler's own code
def test_executorch_computes_what_eager_does(run):
    made = exported(run, "executorch", "none")
    assert max(value for name, value in made.checks.items() if name.endswith("_error")) < 1e-4
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], rel=1e-6)


@needs_executorch
@pytest.mark.filterwarnings("ignore")
def test_four_bits_in_executorch_are_a_quarter_of_the_bytes(run):
    made = exported(run, "executorch", "8da4w")
    whole = sum(4 * parameter.numel() for parameter in open_trained(run).model().parameters())
    assert made.bytes < 0.25 * whole
    assert made.checks["prompt_error"] > 1e-4, "it is quantised"
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], rel=1e-2)


def test_eight_bits_in_onnxruntime_from_four_processes(run):
    made = exported(run, "onnx", "int8")
    assert made.checks["loss"] == pytest.approx(made.checks["eager_loss"], rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_native_code_computes_what_eager_does(run):
    made = exported(run, "aoti", "none")
    assert max(value for name, value in made.checks.items() if name.endswith("_error")) < 1e-4
    _, runner = open_runner(run / "exports" / "aoti-none", trust=True)
    assert runner.speed(open_trained(run).corpus().validation_batch(0, 1, 1, slice(None))[0][0, :4].numpy(), 2)[1] > 0
