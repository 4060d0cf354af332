"""`scripts/verify.py`: what it prints, its exit code, and that it never waits for long."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SMALL = ("model.num_layers=2", "train.seq_len=16", "train.global_batch_size=4", "runtime.device=cpu")


def verify(*argv, bad_worker=""):
    script = "from scripts.verify import main; import sys; sys.exit(main(sys.argv[1:], 'tests.bad_worker'))"
    command = [sys.executable, *(["-c", script] if bad_worker else [str(REPO / "scripts" / "verify.py")]), *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1", "BAD_WORKER": bad_worker, "PYTHONPATH": str(REPO)}
    return subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)


def test_several_strategies_in_one_world_equal_one_device():
    run = verify("nproc=2", "strategy=tp,pp", "precision=float64", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("equals one device") == 2
    assert "tp on 2 process(es): tp 2" in run.stdout
    rows = [line.split() for line in run.stdout.splitlines() if line.endswith(" ok")]
    columns = ["loss", "gradients", "grad_norm", "sgd_weights", "adamw_loss"]
    assert [row[0] for row in rows] == columns * 2
    assert all(float(row[2 if row[0] != "adamw_loss" else 3]) <= 1e-9 for row in rows)


def test_what_a_lossy_option_leaves_out_is_said():
    run = verify("nproc=2", "strategy=dp", "strategy.comm_hook=powersgd", *SMALL)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "  strategy.comm_hook=powersgd rounds gradients before they are sent\n" in run.stdout
    assert "equals one device; strategy.comm_hook=powersgd has no effect in these few steps" in run.stdout


def test_a_wrong_strategy_differs():
    run = verify("nproc=2", "strategy=dp", *SMALL, bad_worker="wrong")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "DIFFERS from one device in" in run.stdout
    assert any(line.split()[0] == "gradients" and line.endswith("differs") for line in run.stdout.splitlines() if line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dies", "rank 1 exited with code 7"),
        ("raises", "rank 1 has no luck"),
        ("hangs", "runtime.timeout_s"),
    ],
)
def test_a_lost_rank_ends_the_command(kind, message):
    started = time.monotonic()
    run = verify("nproc=2", "strategy=dp", "runtime.timeout_s=20", *SMALL, bad_worker=kind)
    assert run.returncode == 1, run.stdout + run.stderr
    assert message in run.stdout
    assert time.monotonic() - started < 20 + 20 + 30  # the reference's world, the other, and imports


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("nproc=2 strategy=dp,", "strategy= does not name a preset"),
        ("nproc=2 strategy=dp,foo", "strategy=foo does not name a preset"),
        ("nproc=4 strategy=dp,tp model.ffn_dim=350", "model.ffn_dim=350 is not divisible by strategy.tp=4"),
        ("nproc=2 strategy=single", "strategy=single runs on 1 process"),
        ("nproc=2 strategy=tp model.dropout=0.1", "model.dropout=0.1 draws masks that differ"),
        ("nproc=none", "nproc=none"),
    ],
)
def test_bad_input(argv, message):
    run = verify(*argv.split())
    assert (run.returncode, run.stdout) == (2, "")
    assert message in run.stderr and "Traceback" not in run.stderr
