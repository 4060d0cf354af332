"""Texts and evaluations of any size: how much is read, and that the memory is bounded."""

import dataclasses
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.texts import LINES, base, config, load
from train.config.problems import BadInput
from train.data.corpus import MOST_WINDOWS, load_corpus

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 12_345])
def test_windows_of_an_evaluation_are_evenly_spread(count, tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 20)
    corpus = load(tmp_path / "a.txt")
    last = len(corpus.validation) - corpus.seq_len - 1
    assert np.array_equal(
        corpus._validation_starts(np.arange(count), count), np.linspace(0, last, count).astype(np.int64)
    )


def test_more_evaluation_than_there_is_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(LINES * 20)
    many = dataclasses.replace(base().train, eval_batches=10**9)
    with pytest.raises(BadInput, match=r"more than the 2,488 places .* use train.eval_batches=311 or less"):
        load_corpus(dataclasses.replace(config(tmp_path / "a.txt"), train=many))


PEAK = """
import re, sys
from pathlib import Path
sys.argv[0] = "launch.explain"
from launch import explain
code = 0
try:
    explain.main()
except SystemExit as end:
    code = end.code
peak = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]  # getrusage's is the parent's too
print("peak MiB", int(peak) / 1024, "code", code, file=sys.stderr)
"""


def explained(*words):
    """(What it printed, its peak of memory in MiB, its exit code)."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, *words], env=environment, capture_output=True, text=True, timeout=60
    )
    *_, last = run.stderr.strip().splitlines()
    _, _, peak, _, code = last.split()
    assert "Traceback" not in run.stderr
    return run.stdout + run.stderr, float(peak), code


@pytest.mark.timeout(70)
def test_a_text_of_20_gb_is_valid_and_not_read(tmp_path):
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(20 * 10**9)
    said, peak, code = explained("strategy=dp", "data=text", f"data.path={tmp_path}/sparse.txt")
    assert code == "0" and "problems" not in said
    assert peak < 500
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    corpus = load(tmp_path / "sparse.txt")
    assert len(corpus.training) + len(corpus.validation) == 20 * 10**9
    assert corpus.batch(1, 8, slice(0, 8))[0].shape == (8, 32)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun) / 1024 < 100


@pytest.mark.timeout(70)
def test_the_root_of_the_machine_is_answered():
    said, peak, code = explained("strategy=dp", "data=text", "data.path=/")
    assert code in ("0", "2") and peak < 500, said


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_the_baseline_of_100_mb_is_bounded(tmp_path):
    """Reading, hashing and fitting the bigram model must need little memory: 14 bytes per character were 1.4 GB."""
    (tmp_path / "text.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 10**8, dtype=np.uint8).tobytes())
    (tmp_path / "other.txt").write_text(LINES)
    program = f"""
import resource, sys
from train.command import cli
from train.data.corpus import load_corpus
config = cli.parse(cli.parser("test", ""), ["data=text", "data.path={tmp_path}"])[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
corpus = load_corpus(config)
corpus.sha256, corpus.bigram_loss({MOST_WINDOWS})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=90
    )
    assert float(run.stdout) < 150
