"""Runs and sweeps write files atomically, and an incomplete, empty or older file affects only its own point."""

import json
import os
from contextlib import closing
from pathlib import Path

import pytest

from launch.sweep import main
from tests.fake_sweep import Fake
from tests.test_sweep import state, statuses
from train.record.run_dir import write_summary
from train.record.run_files import write_whole
from train.record.sinks import JsonLines

WORDS = ["strategy=dp,tp", "nproc=2", "data=synthetic"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.sweep.path_of", lambda script: Path(script).name)  # of this folder, not the program


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_summary(tmp_path, {"steps": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_summary(tmp_path, {"steps": 2})
    assert json.loads(path.read_text()) == {"steps": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("what", ["summary", "sample", "points"])
def test_no_reader_sees_a_part(what, tmp_path, monkeypatch):
    """A file gets its name only when it is complete, by a rename."""
    renamed = []

    def replace(new, path):
        renamed.append((Path(path).name, json.loads(Path(new).read_text()), Path(path).exists()))

    monkeypatch.setattr(os, "replace", replace)
    if what == "summary":
        write_summary(tmp_path, {"a": 1})
    elif what == "sample":
        with closing(JsonLines(tmp_path)) as sink:
            sink.sample(10, {"ranks": []})
    else:
        write_whole(tmp_path / "points.json", "[1]")
    (name, content, there) = renamed[0]
    assert name == {"summary": "summary.json", "sample": "step-10.json", "points": "points.json"}[what]
    assert content and not there


def torn(path):
    path.write_text(path.read_text()[:20])


def emptied(path):
    path.write_text("")


def older(path):
    path.write_text("{}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("harm", [torn, emptied])
def test_a_summary_that_is_not_whole_costs_its_point(harm, capsys):
    assert main(WORDS, Fake()) == 0
    harm(Path(state()["points"][0]["run_dir"]) / "summary.json")
    capsys.readouterr()
    again = Fake()
    assert main(WORDS, again) == 0
    assert [words[0] for words, _ in again.started] == ["strategy=dp"]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("dp: not counted as done: summary.json is ")
    assert statuses() == {"dp": "done", "tp": "done"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("values", [{"perf/tokens_per_s": None}, {"perf/tokens_per_s": "fast"}])
def test_a_summary_without_a_speed_costs_its_point(values, capsys):
    assert main(WORDS, Fake()) == 0
    (Path(state()["points"][1]["run_dir"]) / "summary.json").write_text(json.dumps(values))
    again = Fake()
    assert main(WORDS, again) == 0
    assert [words[0] for words, _ in again.started] == ["strategy=tp"]
    assert "tp: not counted as done: summary.json" in capsys.readouterr().err


@pytest.mark.timeout(120)
@pytest.mark.parametrize("harm", [torn, older])
def test_a_points_json_that_is_not_whole_costs_nothing_that_the_runs_tell(harm, capsys):
    assert main(WORDS, Fake()) == 0
    (path,) = Path("runs").glob("sweep-*/points.json")
    harm(path)
    capsys.readouterr()
    again = Fake()
    assert main(WORDS, again) == 0
    assert again.started == []
    err = capsys.readouterr().err.splitlines()
    assert len(err) == (0 if harm is older else 1) and all("known by their runs alone" in line for line in err)
    assert statuses() == {"dp": "done", "tp": "done"}


@pytest.mark.timeout(120)
def test_a_point_of_an_older_version_or_of_another_type_costs_itself(capsys):
    assert main(WORDS, Fake()) == 0
    (path,) = Path("runs").glob("sweep-*/points.json")
    values = json.loads(path.read_text())
    dp, tp = values["points"]
    values["points"] = [{"overrides": dp["overrides"], "nproc": 2, "status": "done"}, tp | {"tried": "none"}, 5]
    path.write_text(json.dumps(values))
    capsys.readouterr()
    assert main(WORDS, Fake()) == 0
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "point 2 is left out (it: tried is none" in err[0] and "point 3" in err[1]
    assert statuses() == {"dp": "done", "tp": "done"}


@pytest.mark.timeout(120)
def test_what_is_no_file_does_not_hold_a_sweep_up(capsys):
    assert main(WORDS, Fake()) == 0
    (path,) = Path("runs").glob("sweep-*/points.json")
    path.unlink()
    os.mkfifo(path)
    (told,) = path.parent.glob("dp.run")
    told.unlink()
    os.mkfifo(told)
    again = Fake()
    assert main(WORDS, again) == 0
    assert [words[0] for words, _ in again.started] == ["strategy=dp"]
    assert "not a regular file" in capsys.readouterr().err
