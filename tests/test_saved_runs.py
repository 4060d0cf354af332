"""What a user does with the checkpoints of a run: go on from them, compare them, export them."""

import json
import os
import re
import shutil

import pytest
import torch

from scripts import checkpoint as tool
from tests.saved_runs import SMALL, flipped, newest, train
from train.checkpoint.changes import allowed_changes
from train.checkpoint.folder import complete
from train.checkpoint.manifest import Manifest
from train.checkpoint.whole.tensors import whole_tensor
from train.command.process.life import Living, is_alive
from train.config.problems import BadInput

CHANGES = [
    (["model.dim=64"], "model.dim=64 instead of 128: the checkpoint's weights belong to another model"),
    (["model.num_layers=2"], "model.num_layers=2 instead of 1"),
    (["precision=float64"], "precision=float64 instead of float32: the checkpoint's weights are of another type"),
    (["train.seed=1"], "train.seed=1 instead of 1234: the run would not see each sample once"),
    (["optim=sgd"], "optim.name=sgd instead of adamw: the optimiser's state in the checkpoint is of another kind"),
]
NO_STEP_IS_LEFT = "is the state after step 4: use train.steps=8, for example"


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_what_may_not_change_is_refused_by_name(run, tmp_path):
    """All at once, and the number of steps, which is no change of what is saved."""
    changes = [word for words, _ in CHANGES for word in words]
    for words, says in (changes, [says for _, says in CHANGES]), (["train.steps=4"], [NO_STEP_IS_LEFT]):
        result = train(tmp_path, "train.steps=6", *words, f"checkpoint.resume={run}")
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        assert all(result.stderr.count(one) == 1 for one in says), result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name], "nothing was started"


@pytest.mark.timeout(200)
def test_a_new_run_starts_from_another_run(run, tmp_path):
    result = train(tmp_path, "train.steps=6", "optim.lr=0.002", f"checkpoint.resume={run}")
    assert result.returncode == 0, result.stderr
    said = f"starting from {newest(run)}, with optim.lr=0.002 instead of 0.001, train.steps=6 instead of 4"
    assert said in result.stdout
    (new,) = {*(tmp_path / "runs").iterdir()} - {run}
    assert [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()] == [5, 6, 6]


@pytest.mark.timeout(200)
def test_a_run_from_another_one_is_continued_by_the_same_line(run, tmp_path):
    line = ("train.steps=6", "checkpoint.every=1", f"checkpoint.resume={run}")
    assert train(tmp_path, *line).returncode == 0
    (new,) = {*(tmp_path / "runs").iterdir()} - {run}
    cut_off(new)
    again = train(tmp_path, *line)
    assert again.returncode == 0, again.stderr
    assert f"continuing runs/{new.name} after step 5" in again.stdout
    assert [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()] == [5, 6, 6]


def cut_off(run):
    """Make the run look as if it had been cut off before its last save."""
    shutil.rmtree(newest(run))
    for name in ("summary.json", "life.json"):
        (run / name).unlink()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    result = train(tmp_path, "metrics.dir=/proc/none")
    assert result.returncode == 3 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[1].startswith("  metrics.dir=/proc/none cannot be written (No such file"), result


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_text_changes_between_runs(tmp_path):
    """It is replaced by another, cut, and removed; and then put back."""
    path, text = tmp_path / "text.txt", "some words of a text " * 2000
    words = ("data=text", f"data.path={path}", "train.steps=4", "checkpoint.every=2")
    path.write_text(text)
    assert train(tmp_path, *words).returncode == 0
    (run,) = (tmp_path / "runs").iterdir()
    cut_off(run)
    another = "data.corpus_sha256=.*: train on the same text, or start a new run"
    wrong: list[tuple[str | None, str]] = [("other words of a text " * 2000, another), (text[:20_000], another)]
    wrong += [(None, "does not exist")]
    for content, says in wrong:
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        refused = train(tmp_path, *words)
        assert refused.returncode == 2 and re.search(says, refused.stderr), refused.stderr
        assert "Traceback" not in refused.stderr
    path.write_text(text)
    again = train(tmp_path, *words)
    assert again.returncode == 0, again.stderr
    assert f"continuing runs/{run.name} after step 2" in again.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none", ", as there is no such folder"),
        ("empty", ""),
        ("run", ", as its run had checkpoint.every=0, or was cut off before its first save"),
    ],
)
def test_a_folder_without_a_checkpoint_is_named(name, why, tmp_path, capsys):
    """The message does not say that nothing was trained, as that is not what the tool knows."""
    for folder in ("empty", "run"):
        (tmp_path / folder).mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for command in (["inspect"], ["verify"], ["export", "target"]):
        with pytest.raises(SystemExit) as ended:
            tool.main([command[0], str(tmp_path / name), *command[1:]])
        assert ended.value.code == 2
        fix = "give the directory of a run, or one of its checkpoints/step-N"
        assert capsys.readouterr().err == f"{tmp_path / name} has no checkpoint{why}: {fix}\n"


def test_a_path_without_a_checkpoint_is_refused(tmp_path):
    result = train(tmp_path, f"checkpoint.resume={tmp_path}")
    assert result.returncode == 2 and "has no checkpoint: use the directory of a run" in result.stderr


def test_a_run_that_is_alive_is_refused(run, tmp_path):
    (run / "summary.json").unlink()
    living = Living(run, 3)
    try:
        assert is_alive(run)
        with pytest.raises(BadInput, match=f"is being trained by process {os.getpid()} on "):
            Living(run, 3)
        result = train(tmp_path, "train.steps=4", "checkpoint.every=2")
        assert result.returncode == 3
        assert f"runs/{run.name} is being trained by process {os.getpid()}" in result.stderr
    finally:
        living.end("finished")
    assert not is_alive(run)


@pytest.mark.timeout(200)
def test_a_damaged_newest_checkpoint_is_passed_over(run, tmp_path):
    flipped(newest(run))
    (run / "summary.json").unlink()
    (run / "life.json").unlink()
    again = train(tmp_path, "train.steps=4", "checkpoint.every=2")
    assert again.returncode == 0, again.stderr
    assert "step-4 is not used: __0_0.distcp has another SHA-256" in again.stdout
    assert f"continuing runs/{run.name} after step 2" in again.stdout
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 4], "each step once, and the validation after the last"


def test_diff_names_what_differs(finished, run, capsys):
    assert tool.main(["diff", str(finished), str(run)]) == 0
    first, second = complete(run)
    assert tool.main(["diff", str(first), str(second)]) == 1
    shown = capsys.readouterr().out
    assert "exp_avg/embed.weight: error " in shown and "the largest error is" in shown


def test_export_gives_transformers_the_same_logits(finished, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    from tests.anchors.models import batch
    from train.command import cli
    from train.model.transformer import Transformer, dtypes

    target = tmp_path / "exported"
    assert tool.main(["export", str(finished), str(target)]) == 0
    theirs = transformers.LlamaForCausalLM.from_pretrained(target, attn_implementation="sdpa").eval()
    config = cli.configured(SMALL)
    ours = Transformer(config.model, **dtypes(config.precision)).to_empty(device="cpu")
    manifest = Manifest.read(newest(finished))
    weights = {
        name: whole_tensor(newest(finished), manifest, f"parameter/{name}") for name, _ in ours.named_parameters()
    }
    ours.load_state_dict(weights, strict=False)
    tokens, _, _ = batch(config.model, 3)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(tokens), theirs(input_ids=tokens).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(SystemExit):
        tool.main(["export", str(finished), str(target)])  # it exists


def test_allowed_changes_are_said():
    saved = {"train": {"steps": 4, "seed": 1}, "optim": {"lr": 0.1}, "precision": "float32"}
    now = {"train": {"steps": 8, "seed": 1}, "optim": {"lr": 0.2}, "precision": "bf16"}
    assert allowed_changes(saved, now) == [
        "optim.lr=0.2 instead of 0.1",
        "precision=bf16 instead of float32",
        "train.steps=8 instead of 4",
    ]
    mixture = {"num_experts": 4, "top_k": 2}
    for one, other in (
        ({"num_experts": 0, "top_k": 1}, mixture | {"num_experts": 0}),
        ({"num_experts": 0}, {"num_experts": 0, "top_k": 1}),
    ):
        assert allowed_changes({"model": one}, {"model": other}) == [], "neither of the two reads model.top_k"
    with pytest.raises(BadInput) as refused:
        allowed_changes({"model": {"num_experts": 0, "top_k": 2}}, {"model": mixture})
    assert "model.num_experts=4 instead of 0" in str(refused.value) and "top_k" not in str(refused.value)
    with pytest.raises(BadInput, match=r"model.top_k=2 instead of 1"):
        allowed_changes({"model": mixture | {"top_k": 1}}, {"model": mixture})
    with pytest.raises(BadInput, match=r"train.seed=2 instead of 1: .*use train.seed=1, or start a new run"):
        allowed_changes(saved, now | {"train": {"steps": 4, "seed": 2}})
