"""A trained model teaches another one (`train.teacher`), under every layout without a pipeline as on one device."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from tests.refused import assert_refused_with_a_fix
from tests.rows.base import F64, row
from tests.running import run_rows
from tests.saved_runs import newest, train
from tests.test_equivalence import MUST_BE_RED, assert_green, verdicts
from train.checkpoint.checkpoints import with_given
from train.checkpoint.resume import Start
from train.checkpoint.whole.trained import open_trained
from train.command import cli
from train.config.problems import BadInput
from train.config.world import World
from train.ranks.side_group import SideGroup
from train.strategies.distil.divergence import Divergence

WORDS = ("train.distil_weight=0.7", "train.distil_temperature=2.0")
LAYOUTS = {
    "dp": ("strategy=dp",),
    "fsdp": ("strategy=fsdp", "train.activation_checkpointing=full"),
    "tp": ("strategy=tp",),
    "whole logits": ("strategy=tp", "strategy.loss_parallel=false"),
    "cp": ("strategy=cp", "strategy.cp_method=ring"),
}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_divergence_and_its_gradient_are_those_of_torch(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 11, dtype=torch.float64, generator=generator)
    student.requires_grad_()
    counted = torch.tensor([True, False, True, True, True, False])
    ours = Divergence.apply(student, teacher, counted, temperature, None)
    one, other = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    right = (F.kl_div(one, other, log_target=True, reduction="none").sum(-1) * counted).sum()
    assert ours.item() == pytest.approx(right.item(), rel=1e-12)
    (a,), (b,) = (torch.autograd.grad(3 * x, student) for x in (ours, right))
    assert torch.allclose(a, b, rtol=0, atol=1e-15)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_layout_learns_as_one_device(run, tmp_path):
    """The teacher has one layer, and the student two."""
    words = (F64, *WORDS, f"train.teacher={run}")
    rows = [row(2, *strategy, options=words) for strategy in LAYOUTS.values()]
    wrong = row(2, "strategy=cp", "strategy.cp_method=ring", options=words, bug="taught_other_tokens")
    results = run_rows(tmp_path, [*rows, wrong])
    for one in rows:
        assert_green(results[one.name])
    red = {verdict.column for verdict in verdicts(results[wrong.name]) if not verdict.ok}
    assert results[wrong.name]["patched_calls"] and red & MUST_BE_RED


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_products_learn_as_one_device(run, tmp_path):
    words = (F64, *WORDS, f"train.teacher={run}")
    rows = [row(4, f"strategy={name}", options=words) for name in ("fsdp_tp", "fsdp_cp", "cp_tp", "hsdp")]
    results = run_rows(tmp_path, rows)
    for one in rows:
        assert_green(results[one.name])


@pytest.mark.timeout(200)
def test_the_validation_loss_is_that_of_the_text(run, tmp_path):
    words = [
        f"train.teacher={run}",
        "train.distil_weight=1.0",
        "checkpoint.every=1",
        "optim.lr=0",
        "metrics.dir=taught",
    ]
    result = train(tmp_path, *words, "train.steps=2")
    assert result.returncode == 0, result.stderr
    (taught,) = (tmp_path / "taught").iterdir()
    untaught = train(tmp_path, "optim.lr=0", "train.steps=2", "metrics.dir=untaught")
    assert untaught.returncode == 0, untaught.stderr
    (other,) = (tmp_path / "untaught").iterdir()
    summaries = [json.loads((path / "summary.json").read_text()) for path in (taught, other)]
    assert summaries[0]["validation/loss"] == summaries[1]["validation/loss"], "the same weights, which lr=0 keeps"
    assert summaries[0]["train/loss"] != summaries[1]["train/loss"]
    given = {"distil_weight": 1.0, "distil_temperature": 1.0, "teacher_sha256": open_trained(run).sha256}
    assert json.loads((taught / "work.json").read_text())["work"]["given"] == given
    assert open_trained(taught).config.train.teacher is None


def test_a_run_that_goes_on_keeps_its_teacher_and_the_hash_of_its_first_weights():
    given = {"teacher_sha256": "a", "weights_sha256": "w"}
    start = Start(Path("step-2"), SimpleNamespace(work={"given": given}), run=Path("runs/x"))  # type: ignore[arg-type]
    config, alone = cli.configured(["checkpoint.weights=gone"]), SideGroup(World.single())
    same, other = (SimpleNamespace(sha256=sha256, folder=Path("t")) for sha256 in "ab")
    assert with_given(start, config, same, alone).given == given  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="runs/x had another teacher than t"):
        with_given(start, config, other, alone)  # type: ignore[arg-type]
    elsewhere = dataclasses.replace(start, run=None)  # a new run, from another one's state
    assert with_given(elsewhere, config, None, alone).given == {}


@pytest.mark.parametrize(
    ("line", "size", "rule"),
    [
        ("strategy=pp", 2, "distil_pipeline"),
        ("strategy=ds_zero1", 2, "ds_teacher"),
        ("strategy=dp runtime.elastic=true", 2, "elastic_teacher"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_fix(line, size, rule):
    assert_refused_with_a_fix([*line.split(), "train.teacher=runs/x"], size, rule)


@pytest.mark.timeout(100)
def test_a_teacher_that_cannot_teach_is_said_once(run, tmp_path):
    for words, says in {
        ("train.teacher=nothing",): "train.teacher=nothing cannot be used: nothing has no checkpoint",
        (f"train.teacher={newest(run)}", "model.vocab_size=300"): "has a vocabulary of 256 tokens",
    }.items():
        result = train(tmp_path, *words)
        assert result.returncode == 2 and result.stderr.count(says) == 1, result.stderr
        assert "Traceback" not in result.stderr
