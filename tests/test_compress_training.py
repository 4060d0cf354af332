"""Methods of scripts/compress.py that train, with the lab's own loop on two processes, and the study of all methods."""

import json
import subprocess
import sys

import pytest
import torch

from scripts.compressing.methods.prune import prunable
from scripts.compressing.opened import open_model
from scripts.compressing.record import Record
from scripts.compressing.studying import plan
from tests.saved_runs import ENV, REPO, train
from train.checkpoint.whole.trained import open_trained, validation_loss

pytest.importorskip("torchao")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
TWO = ["strategy=dp", "nproc=2", "train.micro_batch_size=1", "metrics.tensorboard=false", "runtime.device=cpu"]


def compress(*argv):
    command = [sys.executable, str(REPO / "scripts" / "compress.py"), *map(str, argv), "tokens=2"]
    run = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    run = train(folder, "train.steps=30", "model.num_layers=2", "train.eval_batches=4")
    assert run.returncode == 0, run.stderr
    (path,) = (folder / "runs").iterdir()
    return path


def made(parent, method):
    """The compressed run of a method, whose name has a hash of the training's words."""
    (path,) = parent.parent.glob(f"{parent.name}-{method}-*")
    return open_model(path), Record.read(path)


def test_a_pruned_model_trains_on_with_its_zeros_and_is_compared_with_its_parent_trained_on(parent):
    out = compress(parent, "method=prune_2_4", "calibration=4", "retrain=3", *TWO)
    assert "the parent is trained on" in out
    pruned, record = made(parent, "prune_2_4")
    control, of_control = made(parent, "trained_on")
    model, whole = pruned.model(), control.model()
    start = open_trained(parent).tensors()
    for name, layer in prunable(model).items():
        assert ((layer.weight == 0).unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name
        left = layer.weight != 0
        assert not torch.equal(layer.weight[left], start[name][left]), "it was not trained"
    assert not torch.equal(whole.head.weight, start["head.weight"])
    loss = validation_loss(whole, control.config, control.corpus())
    assert record.control == of_control.after.loss == pytest.approx(loss, rel=1e-6)
    assert record.cost_pct == pytest.approx(100 * (record.after.loss / loss - 1))
    assert record.training["nproc"] == 2 and not [*pruned.folder.rglob("*.distcp")]
    out = compress(parent, "method=qat_8da4w", "retrain=3", *TWO)
    assert "the parent is trained on" not in out, "the control is made once"
    assert made(parent, "qat_8da4w")[1].control == record.control


def test_a_student_learns_from_its_teacher_on_two_processes(parent):
    losses = {}
    for kl in ("true", "false"):
        compress(parent, "method=distil", "init=teacher", f"kl={kl}", "retrain=3", *TWO)
        student, record = made(parent, f"distil-init-teacher-kl-{kl}")
        assert student.config.model.num_layers == 1 and record.control is None
        assert record.after.bytes < record.before.bytes
        losses[kl] = record.after.loss
    assert losses["true"] != losses["false"], "the teacher has no effect"


def test_a_study_goes_on_and_judges_itself(tmp_path, monkeypatch, capfd):
    from scripts.compressing import study

    monkeypatch.setattr(plan, "LAST", 5)
    monkeypatch.setattr("scripts.compressing.studying.trainings.LEAST_FALL", 0.5)
    monkeypatch.setattr("scripts.compressing.studying.trainings.LAST", 5)
    words = [
        "model=tiny",
        "model.num_layers=2",
        "train.seq_len=16",
        "train.eval_batches=1",
        "train.global_batch_size=2",
    ]
    asked = ["seeds=1,2", "steps=10", "retrain=2", "distil=2", "jobs=2", "only=trained_on,8da4w,qat_8da4w,distil"]
    argv = [str(tmp_path), *asked, "train.seq_len=32", *words[1:]]
    assert study.main(argv) == 0
    out = capfd.readouterr().out
    assert "qat_8da4w: " in out and "distil: a gap of" in out and "parent, float32" in out
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (1 + 1 + 1 + 4 + 1) and {row["of"] for row in rows} == {"parent", "trained_on"}
    parents = {row["record"]["parent"]["sha256"] for row in rows if row["of"] == "parent"}
    assert len(parents) == 2, "each seed has its own parent"
    assert study.main(argv) == 0
    assert (tmp_path / "rows.jsonl").read_text().count("\n") == len(rows), "what is done is not done again"
    assert "trained in" not in capfd.readouterr().out
