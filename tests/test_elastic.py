"""Ranks of data parallelism are killed while they train: the others go on at once, and the curve does not change."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from train.config.world import ROLL

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local_addr=127.0.0.1"]
# 8 rows in microbatches of 2: one for each of 4 ranks, and two for each of 3, of which the last is filled up
SMALL = [
    "runtime.device=cpu", "precision=float64", "model.num_layers=2", "model.dim=32", "model.ffn_dim=64",
    "train.seq_len=64", "train.global_batch_size=8", "train.micro_batch_size=2", "train.eval_batches=2",
    "train.eval_every=20", "metrics.profile_every=0", "train.steps=240", "checkpoint.every=10",
]  # fmt: skip
BOUND = 1e-9
LEFT, GO_ON_S, PATIENCE_S = 60, 5.0, 120


def started(folder, nproc, *overrides):
    """torchrun, as a process whose output is in `folder`/output."""
    folder.mkdir()
    with (folder / "output").open("w") as output:
        return subprocess.Popen(
            [*TORCHRUN, f"--nproc_per_node={nproc}", str(REPO / "train" / "main.py"), *SMALL, *overrides],
            cwd=folder, env=ENV, stdout=output, stderr=output,
        )  # fmt: skip


def lines(folder):
    files = list(folder.glob("runs/*/metrics.jsonl"))
    text = files[0].read_text() if files else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def reaches(process, folder, step):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["step"] >= step for line in lines(folder)):
            return
        time.sleep(0.05)
    raise AssertionError((folder / "output").read_text()[-4000:])


def ranks_of(process):
    """The processes that train, by torchrun's rank. Their parents are the keepers."""
    found = {}
    for one in psutil.Process(process.pid).children(recursive=True):
        env = one.environ()
        if ROLL in env:
            found[int(env["RANK"])] = one
    return found


def curve(folder):
    """(losses, norms and validation losses by step, the steps in the order in which they were written)."""
    records = lines(folder)
    steps = [line["step"] for line in records if "train/loss" in line]
    values = {(line["step"], tag): line[tag] for line in records for tag in line if tag.startswith(("train/", "val"))}
    return values, steps


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic") / "undisturbed"
    process = started(folder, 4, "strategy=dp")
    assert process.wait(PATIENCE_S) == 0, (folder / "output").read_text()
    return curve(folder)


def same_curve(folder, undisturbed):
    values, steps = curve(folder)
    expected, all_steps = undisturbed
    assert steps == all_steps, "each step stands once, in order"
    assert values.keys() == expected.keys()
    return max(abs(values[key] - expected[key]) / max(abs(expected[key]), 1) for key in expected)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 2])
def test_the_others_go_on_and_a_killed_rank_comes_back(rank, undisturbed, tmp_path):
    folder = tmp_path / "run"
    process = started(folder, 4, "strategy=dp", "runtime.elastic=true")
    try:
        reaches(process, folder, 10)
        ranks_of(process)[rank].send_signal(signal.SIGKILL)
        killed = time.time()
        assert process.wait(PATIENCE_S) == 0, (folder / "output").read_text()
    finally:
        process.kill()
    output = (folder / "output").read_text()
    lost = re.search(rf"rank {rank} lost after step (\d+): 3 of 4 ranks go on with step (\d+)", output)
    assert lost is not None, output
    (written,) = (line["time"] for line in lines(folder) if line["step"] == int(lost[2]) and "train/loss" in line)
    assert written - killed < GO_ON_S
    back = re.search(rf"rank {rank} back after step (\d+): 4 of 4 ranks go on", output)
    assert back is not None and int(back[1]) % 10 == 0, output
    assert same_curve(folder, undisturbed) < BOUND
    assert "Traceback" not in output
