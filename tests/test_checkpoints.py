"""The files of a checkpoint: what is refused, and in which words; and what a user does with them."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scripts import checkpoint as tool
from train.checkpoint.changes import allowed_changes
from train.checkpoint.folder import Folder, check_space, complete
from train.checkpoint.format import read_metadata
from train.checkpoint.manifest import MANIFEST, METADATA, Damaged, File, Manifest, wrong_files
from train.checkpoint.whole import whole_tensor
from train.command.process.life import Living, is_alive, read_life
from train.config.problems import BadInput
from train.record.sinks import keep_lines

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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run of four steps, with the checkpoints of the steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    run = train(folder, "train.steps=4", "checkpoint.every=2")
    assert run.returncode == 0, run.stderr
    (path,) = (folder / "runs").iterdir()
    said = re.search(r"^a checkpoint has ([\d.]+) MiB$", run.stdout, re.MULTILINE)
    assert said and float(said[1]) == pytest.approx(Manifest.read(newest(path)).bytes / 2**20, rel=0.1)
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, whose files a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "runs" / finished.name))


def newest(run):
    return complete(run)[0]


def rewrite(folder, **changes):
    """Replace fields of a manifest as somebody would who makes a false one: its own hash is right."""
    manifest = replace(Manifest.read(folder), **changes)
    (folder / MANIFEST).unlink()
    manifest.write(folder)


def test_a_run_leaves_its_newest_checkpoints(finished):
    assert [path.name for path in complete(finished)] == ["step-4", "step-2"]
    assert (finished / "checkpoints" / "latest").read_text() == "step-4\n"
    manifest = Manifest.read(newest(finished))
    assert manifest.step == 4 and manifest.layout["world_size"] == 1
    assert manifest.work["train"]["steps"] == 4 and manifest.work["data"]["corpus_sha256"]
    kinds = {key.partition("/")[0] for key in manifest.tensors}
    assert kinds == {"parameter", "exp_avg", "exp_avg_sq", "step", "rank_0"}
    assert wrong_files(newest(finished), manifest) == []
    assert float(whole_tensor(newest(finished), manifest, "step/embed.weight")) == 4
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["checkpoint/save_s"] > 0 and summary["checkpoint/stall_ms"] > 0
    life = read_life(finished)
    assert life is not None and life.state == "finished" and life.step == 4
    assert not is_alive(finished)


def flipped(folder):
    file = min(folder.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def shortened(folder):
    file = min(folder.glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)


def missing(folder):
    min(folder.glob("*.distcp")).unlink()


def no_metadata(folder):
    (folder / METADATA).unlink()


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def edited(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 4', '"step": 3'))


DAMAGES = {
    flipped: "has another SHA-256 than when it was written",
    shortened: "bytes, and not",
    missing: "cannot be read (No such file or directory)",
    no_metadata: ".metadata cannot be read",
    emptied: "manifest.json cannot be read",
    edited: "does not have the content that was written",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named(damage, run, capsys):
    damage(newest(run))
    assert tool.main(["verify", str(run)]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert DAMAGES[damage] in shown[0] and shown[1].endswith("every file is as it was written")
    assert tool.newest(run) == complete(run)[1], "the older one is used"


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


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_malicious_pickle_runs_nothing(run, tmp_path):
    """Even if its maker has given the manifest the right hashes."""
    folder, marker = newest(run), tmp_path / "marker"
    content = pickle.dumps(Malicious(marker))
    (folder / METADATA).write_bytes(content)
    files = Manifest.read(folder).files | {METADATA: File(len(content), hashlib.sha256(content).hexdigest())}
    rewrite(folder, files=files)
    assert wrong_files(folder, Manifest.read(folder)) == []
    with pytest.raises(Damaged, match=r"it names \w+\.mkdir"):
        read_metadata(folder, Manifest.read(folder))
    result = train(tmp_path, "train.steps=6", f"checkpoint.resume={folder}")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not marker.exists()


def test_a_manifest_cannot_name_other_files(run):
    folder = newest(run)
    files = Manifest.read(folder).files | {"../../../../etc/passwd": File(1, "0" * 64)}
    with pytest.raises(Damaged, match="fields of a manifest"):
        rewrite(folder, files=files)
        Manifest.read(folder)


def test_metadata_of_other_tensors_is_refused(run):
    folder = newest(run)
    manifest = Manifest.read(folder)
    fewer = dict(list(manifest.tensors.items())[1:])
    with pytest.raises(Damaged, match="other tensors than the manifest"):
        read_metadata(folder, replace(manifest, tensors=fewer))


CHANGES = [
    (["model.dim=64"], "model.dim=64 instead of 128: the checkpoint's weights belong to another model"),
    (["model.num_layers=2"], "model.num_layers=2 instead of 1"),
    (["precision=float64"], "precision=float64 instead of float32: the checkpoint's weights are of another type"),
    (["train.seed=1"], "train.seed=1 instead of 1234: the run would not see each sample once"),
    (["optim=sgd"], "optim.name=sgd instead of adamw: the optimiser's state in the checkpoint is of another kind"),
    (["train.steps=4"], "is the state after step 4: use train.steps=8, for example"),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_may_not_change_is_refused_by_name(run, tmp_path):
    for words, says in CHANGES:
        result = train(tmp_path, "train.steps=6", *words, f"checkpoint.resume={run}")
        assert result.returncode == 2 and says in result.stderr, (words, result.stderr)
        assert "Traceback" not in result.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.name], "nothing was started"


def test_allowed_changes_are_said():
    saved = {"train": {"steps": 4, "seed": 1}, "optim": {"lr": 0.1}, "precision": "float32"}
    now = {"train": {"steps": 8, "seed": 1}, "optim": {"lr": 0.2}, "precision": "bf16"}
    assert allowed_changes(saved, now) == [
        "optim.lr=0.2 instead of 0.1",
        "precision=bf16 instead of float32",
        "train.steps=8 instead of 4",
    ]
    with pytest.raises(BadInput, match=r"train.seed=2 instead of 1: .*use train.seed=1, or start a new run"):
        allowed_changes(saved, now | {"train": {"steps": 4, "seed": 2}})


@pytest.mark.timeout(200)
def test_a_new_run_starts_from_another_run(run, tmp_path):
    result = train(tmp_path, "train.steps=6", "optim.lr=0.002", f"checkpoint.resume={run}")
    assert result.returncode == 0, result.stderr
    said = f"starting from {newest(run)}, with optim.lr=0.002 instead of 0.001, train.steps=6 instead of 4"
    assert said in result.stdout
    (new,) = {*(tmp_path / "runs").iterdir()} - {run}
    assert [json.loads(line)["step"] for line in (new / "metrics.jsonl").read_text().splitlines()] == [5, 6, 6]


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


def test_only_the_newest_are_kept_and_nothing_unfinished(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for step in (1, 2, 3):
        folder.accept(folder.commit(folder.begin(step)))
    folder.begin(4)
    folder.clean()
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step-2", "step-3"]
    folder.accept(folder.commit(folder.begin(2)))  # the run went on from an older one
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step-2"]
    assert (folder.path / "latest").read_text() == "step-2\n"


def test_a_disk_without_room_for_two_is_refused(tmp_path):
    check_space(tmp_path, 1)
    with pytest.raises(BadInput, match=r"two checkpoints need 2,147,483,648.0 GiB, but the disk of .* has [\d,.]+ GiB"):
        check_space(tmp_path, 2**60)


def test_lines_of_later_steps_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1, "a": 2}\n{"step": 2, "a": null}\n{"step": 3, "a": 4}\n{"step": 3, "b"')
    kept = keep_lines(path, 2)
    assert path.read_text() == '{"step": 1, "time": 1, "a": 2}\n{"step": 2, "a": null}\n'
    assert kept[0] == {"a": 2} and kept[1]["a"] != kept[1]["a"]


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
