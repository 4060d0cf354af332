"""The files of a checkpoint: what is refused, and in which words; and what a user does with them."""

import hashlib
import io
import json
import os
import pickle
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, ChunkStorageMetadata

from scripts import checkpoint as tool
from tests.saved_runs import flipped, newest, train
from train.checkpoint.folder import Folder, check_space, complete
from train.checkpoint.manifest import MANIFEST, METADATA, Damaged, File, Manifest, wrong_files
from train.checkpoint.reading import _OnlyMetadata, fills, read_metadata
from train.checkpoint.whole.tensors import whole_tensor
from train.command.process.life import is_alive, read_life
from train.config.problems import BadInput
from train.record.sinks import keep_lines


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


class ByName:
    """An attribute, as Python 3.11.2 pickles a member of an enumeration."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_member_of_an_enumeration_is_read_by_value_and_by_name(finished):
    content = (newest(finished) / METADATA).read_bytes()
    found = _OnlyMetadata(io.BytesIO(content)).load()
    pickled = pickle.dumps([ByName(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT")])
    assert _OnlyMetadata(io.BytesIO(pickled)).load() == [_MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT]
    assert all(one.properties.memory_format == torch.contiguous_format for one in found.state_dict_metadata.values())
    for owner, name in ((_MEM_FORMAT_ENCODING, "__class__"), (torch.Size, "__reduce__")):
        with pytest.raises(pickle.UnpicklingError, match=f"it takes {name} of"):
            _OnlyMetadata(io.BytesIO(pickle.dumps(ByName(owner, name)))).load()


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


@pytest.mark.parametrize("bytes", ["Infinity", "1"])
def test_a_manifest_cannot_have_impossible_sizes(bytes, run):
    """Its tensors are not larger than its files, so that a small checkpoint cannot ask for much memory."""
    folder = newest(run)
    manifest = Manifest.read(folder)
    values = {"format": 1, **asdict(manifest)}
    for one in values["files"].values():
        one["bytes"] = json.loads(bytes)
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(Damaged, match="fields of a manifest"):
        Manifest.read(folder)


@pytest.mark.parametrize("depth", [2, 900, 990])
def test_a_manifest_cannot_be_deeper_than_pythons_stack(depth, run):
    folder = newest(run)
    values = {"format": 1, **asdict(replace(Manifest.read(folder), work={"model": "DEEP"}))}
    text = json.dumps(values, sort_keys=True).replace('"DEEP"', '{"a": ' * depth + "0" + "}" * depth)
    own_hash = hashlib.sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(f'{text[:-1]}, "sha256": "{own_hash}"}}')
    with pytest.raises(Damaged, match=r"fields of a manifest|not valid JSON"):
        Manifest.read(folder)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [MANIFEST, "__0_0.distcp"])
def test_a_pipe_is_no_file_of_a_checkpoint(name, run, capsys):
    (newest(run) / name).unlink()
    os.mkfifo(newest(run) / name)
    assert tool.main(["verify", str(run)]) == 1
    assert f"{name} cannot be read (not a regular file)" in capsys.readouterr().out


def box(offsets, sizes):
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


HALVES = [box((0, 0), (2, 4)), box((2, 0), (2, 4))]
QUARTERS = [box((i, j), (2, 2)) for i in (0, 2) for j in (0, 2)]
BOXES = [
    (HALVES, (4, 4), True),
    (QUARTERS, (4, 4), True),
    ([box((), ())], (), True),
    ([HALVES[0], HALVES[0]], (4, 4), False),  # one half twice
    ([QUARTERS[0], *QUARTERS[:3]], (4, 4), False),
    ([box((0, 0), (2, 4)), box((3, 0), (2, 4))], (4, 4), False),  # outside
    (HALVES[:1], (4, 4), False),
    ([box((0,), (16,))], (4, 4), False),
    ([box((), ()), box((), ())], (), False),
]


@pytest.mark.parametrize(("chunks", "shape", "whole"), BOXES)
def test_parts_must_make_a_whole(chunks, shape, whole):
    assert fills(chunks, shape) is whole


def test_only_the_newest_are_kept_and_nothing_unfinished(tmp_path):
    folder = Folder(tmp_path, keep=2)
    for step in (1, 2, 3):
        folder.accept(folder.commit(folder.begin(step)))
    folder.begin(4)
    (folder.path / ".latest.4711.tmp").touch()
    (tmp_path / ".life.json.4711.tmp").touch()
    folder.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step-2", "step-3"]
    folder.accept(folder.commit(folder.begin(2)))  # the run went on from an older one
    assert sorted(path.name for path in folder.path.iterdir()) == ["latest", "step-2"]
    assert (folder.path / "latest").read_text() == "step-2\n"


def test_a_disk_without_room_is_refused(run):
    check_space(run.parent, 1, 3, None)
    says = r"3 checkpoints of 1,073,741,824.0 GiB need more than the disk of .* has: [\d,.]+ GiB"
    with pytest.raises(BadInput, match=f"{says}: free"):
        check_space(run.parent, 2**60, 3, None)
    with pytest.raises(BadInput, match=f"{says} with those that the run has: free"):
        check_space(run.parent, 2**60, 3, run)


def test_lines_of_later_steps_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1, "a": 2}\n{"step": 2, "a": null}\n{"step": 3, "a": 4}\n{"step": 3, "b"')
    kept = keep_lines(path, 2)
    assert path.read_text() == '{"step": 1, "time": 1, "a": 2}\n{"step": 2, "a": null}\n'
    assert kept[0] == (1, {"a": 2}) and kept[1][0] == 2 and kept[1][1]["a"] != kept[1][1]["a"]
