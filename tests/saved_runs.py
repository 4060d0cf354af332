"""A small run with checkpoints, and copies of it that a test may change."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest

REPO = Path(__file__).resolve().parent.parent
PATHS = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
SMALL = [
    *("strategy=single", "runtime.device=cpu", "model.num_layers=1", "train.seq_len=16", "train.eval_batches=1"),
    *("train.global_batch_size=2", "metrics.tensorboard=false", "metrics.profile_every=0"),
]


def train(folder, *overrides):
    command = [sys.executable, str(REPO / "train" / "main.py"), *SMALL, *overrides]
    return subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True, timeout=100)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The directory of a run of four steps, which no test is given: it is copied."""
    folder = tmp_path_factory.mktemp("trained_once")
    run = train(folder, "train.steps=4", "checkpoint.every=2")
    assert run.returncode == 0, run.stderr
    (path,) = (folder / "runs").iterdir()
    said = re.search(r"^a checkpoint has ([\d.]+) MiB; no rank may need longer than .*=\d+ s", run.stdout, re.MULTILINE)
    assert said and float(said[1]) == pytest.approx(Manifest.read(newest(path)).bytes / 2**20, rel=0.1)
    return path


@pytest.fixture(scope="module")
def finished(trained_once, tmp_path_factory):
    """The directory of a run of four steps, with the checkpoints of the steps 2 and 4. All tests of a file share it."""
    return Path(shutil.copytree(trained_once, tmp_path_factory.mktemp("finished") / "runs" / trained_once.name))


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, whose files a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def newest(run):
    return complete(run)[0]


def flipped(folder):
    file = min(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
