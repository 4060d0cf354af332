"""docs/adding-a-strategy.md, followed to the letter in a copy of the repository."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(?:^`(?P<path>[^`\n]+)`\n\n)?^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
SMALL = ("model.num_layers=2", "train.seq_len=16", "train.micro_batch_size=1", "data.ignore_token=32")
IN_CPU64 = ("runtime.device=cpu", "precision=float64")
SGD = ("optim=sgd", "optim.lr=0.1", "train.clip_norm=0", "train.steps=12", "train.eval_batches=2")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The repository as it is, and what the page adds to it."""
    folder = tmp_path_factory.mktemp("copy")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=REPO, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (REPO / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPO / name).read_bytes())
    path = ""
    for block in BLOCK.finditer((REPO / "docs" / "adding-a-strategy.md").read_text()):
        path = block["path"] or path
        if block["kind"] == "diff":
            add_line(folder / path, block["text"])
        else:
            assert not (folder / path).exists()
            (folder / path).write_text(block["text"])
    return folder


def add_line(file: Path, diff: str) -> None:
    """One line that is there, and the one that comes after it."""
    there, new = diff.splitlines()
    assert (there[0], new[0]) == (" ", "+")
    text = file.read_text()
    assert text.count(there[1:] + "\n") == 1, f"{file.name} has no one line {there[1:]}"
    file.write_text(text.replace(there[1:] + "\n", there[1:] + "\n" + new[1:] + "\n"))


def run(copy, *command):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def train(copy, nproc, folder, *overrides):
    """What it printed, its losses, step by step and at last of validation, and its summary."""
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    words = (*SMALL, *IN_CPU64, *SGD, f"metrics.dir={folder}", *overrides)
    out = run(copy, *started, "train/main.py", *words)
    (path,) = (copy / folder).iterdir()
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    losses = [line.get("train/loss", line.get("validation/loss")) for line in lines]
    return out, losses, json.loads((path / "summary.json").read_text())


@pytest.mark.timeout(300)
def test_the_proof_says_what_the_page_says(copy):
    # one world: strategy.dp_shard=2 is what zero2_tp comes to anyway
    words = ("strategy=zero2_tp,diloco", "nproc=4", "strategy.dp_shard=2", *SMALL, *IN_CPU64)
    product, technique = run(copy, "scripts/verify.py", *words).split("zero2_tp on ")[1].split("diloco on ")
    assert product.rstrip().endswith("equals one device")
    answers = {line.split()[0]: line for line in technique.splitlines()[2:] if line.strip()}
    assert answers["loss"].endswith("1e-09  ok") and answers["gradients"].endswith("1e-09  ok")
    for column in ("grad_norm", "sgd_weights", "adamw_loss"):
        assert "differs, as expected: " in answers[column]
    assert "equals one device but for grad_norm, sgd_weights, adamw_loss, as expected" in technique


@pytest.mark.timeout(300)
def test_it_trains_and_its_limit_is_one_device(copy):
    out, losses, summary = train(copy, 2, "apart", "strategy=diloco", "strategy.inner_steps=4")
    assert "expected to differ from one device in grad_norm" in out and "adamw_loss" in summary["differs"]
    assert losses[-2] < 0.9 * losses[0]

    _, reference, summary = train(copy, 1, "reference", "strategy=single")
    assert summary["differs"] == {}
    average = ("strategy.inner_steps=1", "strategy.outer_lr=1", "strategy.outer_momentum=0")
    _, limit, _ = train(copy, 2, "limit", "strategy=diloco", *average)
    assert limit == pytest.approx(reference, rel=1e-12)
    assert losses[0] == pytest.approx(reference[0], rel=1e-12)
    assert abs(losses[3] - reference[3]) > 1e-6, "this could not have failed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_rows_preset_and_line_pass_the_suite(copy):
    files = ("tests/test_config.py", "tests/test_equivalence.py", "tests/test_explain.py")
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "zero2_tp or diloco or load_torch")
    # preset and README line of both, both rows, and that the new file is read without loading torch
    assert "7 passed" in out, out
