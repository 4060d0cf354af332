"""Follows docs/adding-a-strategy.md exactly, in a copy of the repository."""

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
# these depend on the machine, and on the text of its Python's help
ERROR = re.compile(r"\d\.\de[-+]\d\d|\de[-+]\d\d|(?<=layers\.)\d")
IN_CPU64 = ("runtime.device=cpu", "precision=float64")
# of launch.explain's lines: axis, operation, calls, MiB
SENT = re.compile(r"^    (\S+) +(\w+) +([\d,]+) call\(s\) +([\d.]+) MiB", re.MULTILINE)
SGD = ("optim=sgd", "optim.lr=0.1", "train.clip_norm=0", "train.steps=12", "train.eval_batches=2")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with what the page adds to it."""
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
            change(folder / path, block["text"])
        else:
            assert not (folder / path).exists()
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(block["text"])
    return folder


def change(file: Path, diff: str) -> None:
    """Apply the diff: its old lines, which must occur once in the file, are replaced by its new lines."""
    lines = diff.splitlines(keepends=True)
    assert {line[0] for line in lines} <= {" ", "-", "+"}
    before, after = ("".join(line[1:] for line in lines if line[0] in kinds) for kinds in (" -", " +"))
    text = file.read_text()
    assert f"\n{text}".count(f"\n{before}") == 1, f"{file.name} has these lines not once:\n{before}"
    file.write_text(f"\n{text}".replace(f"\n{before}", f"\n{after}")[1:])


def run(copy, *command, code=0):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *command], cwd=copy, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + (done.stderr if code else "")


def records(copy, nproc, folder, *overrides):
    """What a run printed, its directory, and the lines of its metrics."""
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    words = (*SMALL, *IN_CPU64, *SGD, f"metrics.dir={folder}", *overrides)
    out = run(copy, *started, "train/main.py", *words)
    (path,) = (copy / folder).iterdir()
    return out, path, [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def train(copy, nproc, folder, *overrides):
    """What the run printed, its losses (of each step, and then of validation), and its summary."""
    out, path, lines = records(copy, nproc, folder, *overrides)
    losses = [line.get("train/loss", line.get("validation/loss")) for line in lines]
    return out, losses, json.loads((path / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_proof_says_what_the_page_says(copy):
    # one world: strategy.dp_shard=2 is what zero2_tp comes to anyway
    words = ("strategy=zero2_tp,diloco", "nproc=4", "strategy.dp_shard=2", "runtime.device=cpu")
    product, technique = run(copy, "scripts/verify.py", *words).split("zero2_tp on ")[1].split("diloco on ")
    assert product.rstrip().endswith("equals one device")
    answers = {line.split()[0]: line for line in technique.splitlines()[2:] if line.strip()}
    assert answers["loss"].endswith("1e-09  ok") and answers["gradients"].endswith("1e-09  ok")
    assert answers["replicas"].endswith("0e+00  ok")
    for column in ("grad_norm", "sgd_weights", "adamw_loss", "evaluate"):
        assert "differs, as expected: " in answers[column]
    assert "equals one device but for grad_norm, sgd_weights, adamw_loss, evaluate, as expected" in technique


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (
            "forward_backward(tokens, targets, inverse_num_valid * group.size()) / group.size()",
            "forward_backward(tokens, targets, inverse_num_valid)",
        ),
        ("return total.div_(group.size())", "return total"),
        ("p.detach().copy_(self.weights[name])", "p.detach().copy_(self.weights[name] if self.replica == 0 else p)"),
    ],
)
def test_a_wrong_line_is_told_as_the_page_says(copy, right, wrong):
    page, file = (copy / "docs" / "adding-a-strategy.md").read_text(), copy / "train" / "strategies" / "diloco.py"
    text = file.read_text()
    assert text.count(right) == 1 and f"`{wrong}`" in page
    file.write_text(text.replace(right, wrong))
    words = ("strategy=diloco", "nproc=2", "strategy.inner_steps=2", "runtime.device=cpu")
    try:
        out = run(copy, "scripts/verify.py", *words, code=1)
    finally:
        file.write_text(text)
    sentence = next(line for line in out.splitlines() if line.startswith("  first wrong: "))
    assert ERROR.sub("", sentence) in ERROR.sub("", page), sentence


@pytest.mark.slow
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
    added = "zero2_tp or diloco or loss_parts or vp or load_torch"
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", added)
    # preset and README line of three, five rows, and that the new files are read without loading torch
    assert "12 passed" in out, out


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (
            "strategy=dp strategy.loss_parts=2",
            "does not use tensor parallelism here (3d, 4d, cp_tp, fsdp_tp, moe_3d, tp",
        ),
        ("strategy=tp strategy.loss_parts=3", "128 tokens on each rank is not divisible by strategy.loss_parts=3"),
        ("strategy=vp strategy.vp=1 strategy.tp=2", "strategy.vp=1 is not supported with strategy.tp=2"),
        ("strategy=dp strategy.dp_replicate=2 strategy.vp=1", "use strategy.dp_replicate=null strategy.dp_shard=2 or"),
    ],
)
@pytest.mark.slow
def test_what_is_not_supported_is_refused(copy, line, answer):
    out = run(copy, "-m", "launch.explain", *line.split(), "nproc=2", code=2)
    assert answer in out, out


@pytest.mark.slow
@pytest.mark.parametrize(("key", "value", "preset"), [("comm_hook", "fp16", "dp"), ("tp", "2", "fsdp_tp")])
def test_diloco_has_no_key_that_it_does_not_use(copy, key, value, preset):
    out = run(copy, "-m", "launch.explain", "strategy=diloco", f"strategy.{key}={value}", "nproc=2", code=2)
    message, presets = out.split("use a strategy that has it: ")
    assert f"strategy.{key} is not a key of this strategy" in message
    assert preset in re.split(r"[,\s]+", presets)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("words", "least"),
    [
        (("strategy=tp", "strategy.loss_parts=4"), ("tp", "all_reduce", 4 * 2 * 8)),
        (("strategy=vp",), ("vp", "all_reduce", 4 * 8)),
    ],
)
def test_a_run_sends_what_is_said(copy, words, least):
    """Calls and MiB by axis and operation: those of `launch.explain`, and those that the ledger counted in a run."""
    folder = f"sent-{words[0].removeprefix('strategy=')}"
    _, _, lines = records(copy, 2, folder, *words)
    recorded = next(line for line in reversed(lines) if any(key.startswith("comm/") for key in line))
    explained = run(copy, "-m", "launch.explain", *SMALL, *IN_CPU64, *SGD, *words, "nproc=2")
    said: dict[tuple[str, str], tuple[int, float]] = {}
    for axis, op, calls, size in SENT.findall(explained):
        before = said.get((axis, op), (0, 0.0))
        said[axis, op] = (before[0] + int(calls.replace(",", "")), before[1] + float(size))
    assert said[least[:2]][0] >= least[2]
    counted = {
        (axis, op): (recorded[f"comm/{axis}/{op}_calls"], recorded[f"comm/{axis}/{op}_mib"])
        for axis, op in (key.removesuffix("_calls").split("/")[1:] for key in recorded if key.endswith("_calls"))
        if axis != "lab"
    }
    assert counted.keys() == said.keys()
    for key, (calls, size) in said.items():
        assert counted[key] == (calls, pytest.approx(size, abs=1e-5)), key


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_products_of_the_axis_send_what_is_said(copy):
    """Tests one rank of each product on a fake process group (tests/fake_worker.py)."""
    mixture = ("strategy=ep", "strategy.ep=2", "model=moe_tiny")
    products: dict[int, list[tuple[str, ...]]] = {
        4: [("strategy=fsdp",), ("strategy=cp", "model.tie_embeddings=true"), mixture],
        8: [("strategy=hsdp",)],
    }
    jobs = [
        {"overrides": ["strategy.vp=2", *words, *SMALL, *IN_CPU64], "world_size": size, "rank": size - 1, "count": True}
        for size, lines in products.items()
        for words in lines
    ]
    (copy / "jobs.json").write_text(json.dumps(jobs))
    assert json.loads(run(copy, "-m", "tests.fake_worker", "jobs.json").splitlines()[-1]) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_added_passes_the_checks(copy):
    run(copy, "-m", "ruff", "check", ".")
    run(copy, "-m", "ruff", "format", "--check", ".")
    run(copy, "-m", "mypy", "--package", "train")
    run(copy, "-c", "from importlinter.cli import lint_imports_command as lint; lint()", "--no-logo")
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_house.py")
