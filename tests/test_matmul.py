"""scripts/matmul.py on two processes: the profile that it writes is complete, and the planner takes it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_profile import plan
from train.command.planning import constants
from train.command.planning.job import missing_figures, of_plan
from train.command.planning.profile import OF_ACTIVATIONS, OPS
from train.command.planning.quantities import quantities
from train.command.planning.step_time import step_time

REPO = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
TINY = ("model=tiny", "model.num_layers=1", "train.seq_len=16", "train.micro_batch_size=1", "runtime.device=cpu")


def ran(tmp_path, *words, nproc=1):
    start = ["-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc_per_node={nproc}"]
    command = [sys.executable, *(start if nproc > 1 else []), str(REPO / "scripts" / "matmul.py"), *TINY, *words]
    return subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120)


@pytest.mark.timeout(150)
@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_profile_has_what_the_planner_needs(tmp_path, nproc):
    words = ("profile=mine", f"folder={tmp_path}", "budget_s=3000", "hardware.price_usd_per_hour=1")
    run = ran(tmp_path, *words, nproc=nproc)
    assert run.returncode == 0, run.stderr
    tables = yaml.safe_load((tmp_path / "mine.yaml").read_text())["measured"]
    messages = {f"{op}_float32" for op in (*OPS, *OF_ACTIVATIONS)} | {f"overlap_{op}" for op in OPS[:3]}
    kinds = {f"{kind}_float32" for kind in ("products", "attention", "layer", "loss")}
    assert tables.keys() == {"copy", "optimiser", "products_bf16"} | kinds | (messages if nproc > 1 else set())
    assert "left out" not in run.stdout and "US$ per PFLOP" in run.stdout
    for strategy in ("dp", "fsdp", "tp", "pp") if nproc > 1 else ("single",):
        job = of_plan(plan(f"strategy={strategy} nproc={nproc}", tables))
        assert missing_figures(job) == []
        assert 0 < step_time(quantities(job), constants.load()).total < 3600


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("profile=a/b", "profile=a/b is not valid: profile must be letters"),
        ("budget_s=0", "budget_s=0 is not valid"),
        ("baseline=none", "hardware=measured/none does not name a preset"),
        ("plot=a.jpg", "plot=a.jpg is not valid"),
    ],
)
def test_wrong_words_are_one_message(tmp_path, word, said):
    run = ran(tmp_path, word)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
    assert said in run.stderr
