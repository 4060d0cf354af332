"""The host never waits for the device inside the loop: torch raises an error where it would.

`torch.cuda.set_sync_debug_mode` knows copies to the host (`item`, `tolist`, a blocking `to`), and selecting
elements by a boolean mask. It does not know events, with which the metrics read the figures of the step before.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
STEPS = 8
# From step 3 on, as the steps before compile, allocate and are recorded; the end of a run may wait. "planted" reads a
# value at once.
WATCHED = """
import sys
import torch
from train import step
from train.main import main

first, last, planted = 3, int(sys.argv.pop(1)), sys.argv.pop(1) == "planted"
made, count = step.Step.__call__, 0

def watched(self, tokens, targets, *, lr):
    global count
    count += 1
    torch.cuda.set_sync_debug_mode("error" if first <= count < last else "default")
    result = made(self, tokens, targets, lr=lr)
    if planted and count == first:
        result.loss.item()
    return result

step.Step.__call__ = watched
main()
"""
LOOP = (
    *("model=tiny", f"train.steps={STEPS}", "train.eval_every=0", "train.eval_batches=1", "checkpoint.every=0"),
    *("metrics.profile_every=0", "runtime.device=cuda", "precision=bf16"),
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
]


def ran(tmp_path: Path, *words: str, planted: str = "clean") -> subprocess.CompletedProcess[str]:
    program = tmp_path / "watched.py"
    program.write_text(WATCHED)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc_per_node=1"]
    command = [sys.executable, *launcher, str(program), str(STEPS), planted, *LOOP, *words]
    env = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    "words",
    [
        ("strategy=single",),
        ("strategy=single", "compile.enabled=true"),
        ("strategy=single", "train.activation_checkpointing=full", "train.offload_activations=true"),
        ("strategy=dp",),
        ("strategy=zero1",),
        ("strategy=fsdp",),
        ("strategy=tp", "compile.enabled=true"),
        ("strategy=pp",),
    ],
    ids=" ".join,
)
def test_the_loop_never_waits_for_the_device(tmp_path, words):
    run = ran(tmp_path, *words)
    assert run.returncode == 0, run.stderr[-4000:]
    assert f"step {STEPS}/{STEPS}" in run.stdout


def test_a_value_that_is_read_in_the_loop_is_found(tmp_path):
    run = ran(tmp_path, "strategy=single", planted="planted")
    assert run.returncode != 0
    assert "called a synchronizing CUDA operation" in run.stderr
