"""Loading an artefact unpickles nothing, and runs native code only where that is wanted."""

import dataclasses
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from scripts import export as tool
from scripts.exporting import artefact
from scripts.exporting.running.opened import open_runner
from scripts.exporting.targets import AOTI
from train.config.problems import BadInput


class Planted:
    """It writes a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def exported(finished):
    assert tool.main([str(finished), "to=torch_export"]) == 0
    return finished / "exports" / "torch_export-none"


@pytest.fixture
def program(exported, tmp_path):
    """A copy of the artefact, which a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "program"))


def rewritten(folder, change):
    """The artefact with other entries in its archive, and an export.json that agrees with them."""
    file = folder / "model.pt2"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    entries = {name: change(name.partition("/")[2], content) for name, content in entries.items()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    made = json.loads((folder / artefact.NAME).read_text())
    (folder / artefact.NAME).unlink()
    made["files"] = {name: dataclasses.asdict(one) for name, one in artefact.measured(folder).items()}
    (folder / artefact.NAME).write_text(json.dumps(made))


@pytest.mark.filterwarnings("ignore")  # torch warns of the pickle that it has just run
def test_a_planted_pickle_is_refused_and_not_run(program, tmp_path):
    with zipfile.ZipFile(program / "model.pt2") as archive:
        (samples,) = [one for one in archive.infolist() if "sample_inputs" in one.filename]
        assert samples.file_size == 0, "torch would pickle the sample inputs"
    planted = tmp_path / "planted"
    rewritten(program, lambda name, old: pickle.dumps(Planted(planted)) if "sample_inputs" in name else old)
    with pytest.raises(BadInput, match=r"model\.pt is a pickle, which could run any code"):
        open_runner(program)
    assert not planted.exists()
    with pytest.raises(Exception, match=""):
        torch.export.load(program / "model.pt2")
    assert planted.exists(), "torch itself runs it, so that the refusal is what protects"


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("weights_config.json", b'"use_pickle": false', b'"use_pickle": true', "has a pickled tensor"),
        ("models/model.json", b'"expr_str": "S', b'"expr_str": "print(1).S', "has expr_str="),
        ("archive_version", b"", b"", ""),
    ],
)
def test_other_ways_to_run_code_are_refused(part, old, new, said, program):
    rewritten(program, lambda name, content: content.replace(old, new) if name.endswith(part) else content)
    if said:
        with pytest.raises(BadInput, match=said):
            open_runner(program)
    else:
        open_runner(program)  # written anew without a change, it is loaded


def test_native_code_is_loaded_only_with_trust(tmp_path):
    (tmp_path / AOTI.file).write_bytes(b"native code")
    shape = artefact.Shape(256, 16, 1, 1, 16)
    artefact.Artefact(AOTI, "none", shape, {}, artefact.measured(tmp_path), 1, {}).write(tmp_path)
    with pytest.raises(BadInput, match=r"holds native code, .*: give trust=true"):
        open_runner(tmp_path)
    with pytest.raises(BadInput, match="cannot be loaded by its runtime"):
        open_runner(tmp_path, trust=True)
