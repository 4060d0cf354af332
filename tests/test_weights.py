"""A run starts from given parameters (`checkpoint.weights`), and keeps their zeros (`train.keep_zeros`)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.rows.base import F32, F64, TIED, row
from tests.running import run_rows
from tests.saved_runs import newest, train
from tests.test_deepspeed import needs_deepspeed
from tests.test_equivalence import assert_green
from train.checkpoint.folder import complete
from train.checkpoint.whole.tensors import differences
from train.checkpoint.whole.trained import open_trained
from train.command import cli
from train.model.transformer import Transformer, dtypes
from train.model.weights import global_parameters, initial_value
from train.ranks.zeros import KeptZeros

KEEP = "train.keep_zeros=true"


def pruned(folder: Path, *words: str) -> str:
    """A folder with the weights that a run draws, of which half the entries of every matrix are 0."""
    config = cli.configured(["model.num_layers=2", *words])
    model = Transformer(config.model, **dtypes(config.precision))
    tensors = {
        name: initial_value(name, p.shape, config.model, seed=7)
        for name, p in global_parameters(model, config.model).items()
    }
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor[torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0.0
    folder.mkdir()
    save_file(tensors, str(folder / "weights.safetensors"))
    return str(folder)


def of(path: Path) -> dict[str, torch.Tensor]:
    return open_trained(path).tensors()


@pytest.mark.timeout(100)
def test_a_run_starts_from_the_parameters_of_another(run, tmp_path):
    words = ["train.steps=1", "optim.lr=0", "checkpoint.every=1", f"checkpoint.weights={run}", "train.eval_batches=2"]
    result = train(tmp_path / "runs", *words, "metrics.dir=.")
    assert result.returncode == 0, result.stderr
    assert f"starting with the weights of {newest(run)} (SHA-256 " in result.stdout
    (new,) = [path for path in (tmp_path / "runs").iterdir() if path != run]
    before, after = of(run), of(new)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    given = {"weights_sha256": open_trained(run).sha256}
    facts = json.loads((new / "work.json").read_text())
    assert facts["work"]["given"] == given == json.loads((new / "summary.json").read_text())["given"]
    assert "given" not in json.loads((run / "work.json").read_text())["work"]
    assert facts["work_hash"] != json.loads((run / "work.json").read_text())["work_hash"]


@pytest.mark.timeout(200)
def test_zeros_stay_and_a_resumed_run_is_the_undisturbed_one(tmp_path):
    source = pruned(tmp_path / "pruned", "model.num_layers=1")
    words = [f"checkpoint.weights={source}", KEEP, "checkpoint.every=2", "optim.warmup_steps=0"]
    assert train(tmp_path, *words, "train.steps=4").returncode == 0
    (first,) = (tmp_path / "runs").iterdir()
    start = {name: tensor for name, tensor in open_weights_of(source).items() if tensor.ndim > 1}
    found = of(first)
    for name, tensor in start.items():
        assert torch.equal(found[name] == 0, tensor == 0) and not torch.equal(found[name], tensor), name
    again = ["train.steps=4", "checkpoint.every=2", KEEP, f"checkpoint.resume={complete(first)[-1]}"]
    result = train(tmp_path, *again, "optim.warmup_steps=0")
    assert result.returncode == 0, result.stderr
    (second,) = [path for path in (tmp_path / "runs").iterdir() if path != first]
    assert [*differences(newest(first), newest(second))] == []


def open_weights_of(folder: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(f"{folder}/weights.safetensors")


def test_what_is_zero_is_what_is_frozen():
    """Whatever the optimiser does: momentum of before moves no frozen entry, and no other entry becomes exactly 0."""
    matrix, norm = nn.Parameter(torch.tensor([[0.0, 1.0], [2.0, 3.0]])), nn.Parameter(torch.zeros(2))
    zeros = KeptZeros([matrix, norm])
    matrix.grad, norm.grad = torch.full((2, 2), float("nan")), torch.ones(2)
    zeros.mask_gradients()
    assert matrix.grad[0, 0] == 0 and matrix.grad.isnan().sum() == 3 and norm.grad.sum() == 2
    with torch.no_grad():
        matrix[0, 0], matrix[1, 1] = 0.5, 0.0
    zeros.after_update()
    assert torch.equal(matrix == 0, torch.tensor([[True, False], [False, False]])) and norm.sum() == 0


ROWS = {
    "dp": ("strategy=dp",),
    "fsdp": ("strategy=fsdp",),
    "tp": ("strategy=tp",),
    "cp": ("strategy=cp", "strategy.cp_method=ring"),
    "pp": ("strategy=pp",),
    "zbv": ("strategy=pp", "strategy.schedule=zbv_zero_bubble", "strategy.dp_shard=1"),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout_keeps_the_zeros_of_one_device(tmp_path):
    tied, mixture = pruned(tmp_path / "tied", TIED, "model.num_layers=4"), pruned(tmp_path / "moe", "model=moe_tiny")
    words = (F64, KEEP, TIED, "model.num_layers=4", f"checkpoint.weights={tied}")
    rows = [row(2, *strategy, options=words) for strategy in ROWS.values()]
    rows += [row(2, "strategy=ep", options=(F64, KEEP, "model=moe_tiny", f"checkpoint.weights={mixture}"))]
    results = run_rows(tmp_path, rows)
    for one in rows:
        assert_green(results[one.name])


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_engines_start_from_the_parameters_too(tmp_path):
    source = pruned(tmp_path / "weights")
    rows = [row(2, f"strategy={name}", options=(F32, f"checkpoint.weights={source}")) for name in ("ds_zero3", "ds_pp")]
    results = run_rows(tmp_path, rows)
    for one in rows:
        assert_green(results[one.name])


@pytest.mark.slow
def test_what_is_no_source_is_said_once(run, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    other = pruned(tmp_path / "other", "model.num_layers=1", "model.dim=64")
    for source, says in {
        str(tmp_path / "nothing"): "has no checkpoint, as there is no such folder",
        str(foreign): "cannot be read",
        other: "is of another model: its parameter embed.weight is [256, 64], but in this model it is [256, 128]",
    }.items():
        result = train(tmp_path, f"checkpoint.weights={source}")
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert result.stderr.count(says) == 1, result.stderr
