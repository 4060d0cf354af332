"""Any command line is valid or refused with a message, within five seconds and 500 MB, and leaves no files behind."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch import local
from launch.sweeping.grid import expand
from tests.drawn_lines import lines
from train.config.problems import BadInput

REPO = Path(__file__).resolve().parent.parent
NUMBER = 300
THOUSANDS = "model=llama_70b nproc=16384 precision=bf16 hardware=h100_sxm train.micro_batch_size=1"

# command line -> (exit code, what is said)
EXTREMES = {
    "strategy.tp=1000000000 nproc=4": (2, "strategy.tp=1000000000 is out of range"),
    "nproc=10000000000000000000000": (2, "is not valid: nproc must be a positive integer, at most 32,768: use nproc=4"),
    "model.num_layers=10000000": (2, "model.num_layers=10000000 is out of range"),
    "train.global_batch_size=1000000000 train.micro_batch_size=1": (2, "train.global_batch_size=1000000000 is out of"),
    "train.eval_batches=1000000000": (2, "train.eval_batches=1000000000 is out of range"),
    "train.eval_batches=10000000 train.global_batch_size=8": (2, "more than 16,777,216 windows per evaluation"),
    "runtime.timeout_s=1e308": (2, "runtime.timeout_s=1e+308 is out of range"),
    "runtime.timeout_s=1e-9": (2, "runtime.timeout_s=1e-09 is out of range"),
    "model.vocab_size=9223372036854775808": (2, "model.vocab_size=9223372036854775808 is out of range"),
    "model.dim=1000000000": (2, "model.dim=1000000000 is out of range"),
    f"train.steps=1{'0' * 400}": (2, "train.steps=a number of 401 digits is out of range"),
    f"train.steps=1{'0' * 5000}": (2, "is not a valid override"),
    "train.seed=18446744073709551616": (2, "train.seed=18446744073709551616 is out of range"),
    "optim.lr=1e308": (2, "optim.lr=1e+308 is out of range"),
    "strategy=dp strategy.bucket_mb=1e308": (2, "strategy.bucket_mb=1e+308 is out of range"),
    "hardware=h100_sxm hardware.peak_tflops.float32=0": (2, "hardware.peak_tflops.float32=0 is not a valid peak"),
    "strategy=pp strategy.stages_per_rank=1000000000": (2, "strategy.stages_per_rank=1000000000 is out of range"),
    "strategy=ep model=moe_tiny strategy.ep=100000": (2, "strategy.ep=100000 is out of range"),
    "train.seed=range(1,100000000000)": (2, "these values make more than 1,000 points: use fewer of them"),
    f"metrics.dir={'a' * 300}": (3, "cannot be written (File name too long)"),
    f"{THOUSANDS} strategy=4d strategy.pp=16 strategy.tp=8 train.global_batch_size=16384": (0, "16,384 ranks"),
    f"{THOUSANDS} strategy=fsdp train.global_batch_size=16384": (0, "rank(s) 0-16383"),
    "strategy=pp nproc=4096 model.num_layers=4096 train.global_batch_size=1000000 train.eval_batches=1 "
    "train.micro_batch_size=1": (0, "not replayed"),
}  # fmt: skip


def outcomes(todo, folder):
    """The result of every line, and the files that were left in the folder. It uses two processes for two cores."""

    def run(part):
        file = folder / f"{part}.json"
        file.write_text(json.dumps(todo[part::2]))
        command = [sys.executable, "-m", "tests.drawn_lines", str(file)]
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor() as both:
        halves = [*both.map(run, (0, 1))]
    assert not any(half["torch"] or half["left"] for half in halves), halves
    return {tuple(one["line"]): one for half in halves for one in half["results"]}


@pytest.mark.timeout(300)
def test_drawn_lines_are_valid_or_refused_in_words(tmp_path):
    todo = lines(NUMBER)
    found = outcomes(todo, tmp_path)
    wrong = [one for one in found.values() if one["code"] not in (0, 2, 3)]
    for one in wrong:
        print(one["code"], *one["line"], one["text"][-800:], sep="\n  ")
    assert not wrong, f"{len(wrong)} of {len(todo)} lines end badly"
    for one in found.values():
        assert "Traceback" not in one["text"]
        if one["code"]:
            assert re.search(r"nothing was trained|\nproblems", one["text"]), one
            assert len(one["text"]) < 20_000, one["line"]
    codes = [one["code"] for one in found.values()]
    assert codes.count(0) > 10 and codes.count(2) > 100


@pytest.mark.timeout(120)
def test_extreme_values_are_answered_at_once(tmp_path):
    found = outcomes([line.split() for line in EXTREMES], tmp_path)
    for line, (code, says) in EXTREMES.items():
        one = found[tuple(line.split())]
        assert (one["code"], says in one["text"]) == (code, True), (line[:200], one["code"], one["text"][-500:])


def start(monkeypatch, *words):
    """The result of launch.local: its exit code, or `started`."""

    def started(*_, **__):
        raise RuntimeError("started")

    monkeypatch.setattr(local, "run_here", started)
    monkeypatch.setattr(sys, "argv", ["launch.local", *words])
    try:
        local.main()
    except SystemExit as stop:
        return stop.code
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("metrics.dir=/proc/x",), "metrics.dir=/proc/x cannot be written (No such file or directory)"),
        ((f"metrics.dir=new/{'a' * 300}",), "cannot be written (File name too long)"),
        (("metrics.dir=new/one", "model=llama_70b", "strategy=dp", "nproc=8", "train.global_batch_size=16",
          "runtime.device=cpu"), "8 processes together hold 8,410 GiB of parameters, gradients and optimiser state"),
    ],
)  # fmt: skip
def test_what_would_die_in_the_ranks_is_refused_and_leaves_nothing(words, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert start(monkeypatch, *words) == 3
    said = capsys.readouterr()
    assert says in said.err and said.err.count("nothing was trained") == 1 and said.out == ""
    assert not [*tmp_path.iterdir()]


def test_force_starts_what_does_not_fit_and_the_folder_is_made_before(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("metrics.dir=new/one", "model=llama_70b", "strategy=dp", "runtime.device=cpu", "force=true")
    assert start(monkeypatch, *words) == "started"
    assert (tmp_path / "new" / "one").is_dir()
    assert start(monkeypatch, "force=perhaps") == 2


def test_a_sweep_of_too_many_points_is_refused():
    with pytest.raises(BadInput, match="more than 1,000 points"):
        expand(["train.seed=range(0,100)", "train.steps=range(1,12)"])
