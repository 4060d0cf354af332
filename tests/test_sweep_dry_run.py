"""launch.sweep dry_run=true: the lines of what is left to run are those that then run, and nothing is written."""

import json
import shlex
from pathlib import Path

import pytest

from launch.sweep import main
from tests.fake_sweep import Fake

REPO = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.sweep.path_of", lambda script: "compare.py")  # there is none: the sweep ends here


def shown(words, start, capsys):
    """What dry_run prints: its comments, and (overrides, nproc) of its torchrun lines."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert main([*words, "dry_run=true"], start) == 0
    assert sorted(Path().rglob("*")) == before, "nothing is written"
    lines = capsys.readouterr().out.splitlines()
    split = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert all(one[:3] == ["torchrun", "--standalone", "--local_addr=127.0.0.1"] for one in split)
    assert all(Path(one[4]) == REPO / "train" / "main.py" for one in split)
    return [line for line in lines if line.startswith("#")], [
        (tuple(one[5:]), int(one[3].removeprefix("--nproc_per_node="))) for one in split
    ]


def test_a_dry_run_prints_what_is_left_to_run_and_starts_nothing(capsys):
    words = ["strategy=dp,single,tp", "nproc=2", "skip_invalid=true"]
    start = Fake(bad=["strategy=tp"])
    said, lines = shown(words, start, capsys)
    assert not start.started
    assert said[:2] == ["# skipped", "#   single"] and said[-2:] == ["# [1/2] dp", "# [2/2] tp"]
    assert main(words, start) == 1
    assert lines == start.started
    said, lines = shown(words, start, capsys)
    assert "# [1/2] dp: done before (fresh=true forgets it)" in said
    assert lines == start.started[1:], "only what failed is run again"
    assert shown([*words, "fresh=true"], start, capsys)[1] == start.started


def test_a_dry_run_of_a_search_prints_its_first_run(capsys):
    words = ["strategy=dp", "nproc=2", "batch=best", "train.micro_batch_size=2", "runtime.device=cpu"]
    start = Fake(speed=lambda words: 100.0)
    _, (first, found) = shown(words, start, capsys)
    assert main(words, start) == 0
    assert first == start.started[0]
    *same, micro, batch, saved = start.started[-1][0]
    assert found == ((*same, "train.micro_batch_size=N", "train.global_batch_size=4*N", saved), 2)
    assert (micro, batch) == ("train.micro_batch_size=2", "train.global_batch_size=8")
    assert shown(words, start, capsys)[1] == []


def test_a_dry_run_of_an_interrupted_search_prints_the_next_run_or_none(capsys):
    """What was tried decides, as it does when the sweep goes on: a run that was not tried yet, or the best of all."""
    words = ["strategy=dp", "nproc=2", "batch=best", "runtime.device=cpu", "max_micro_batch_size=4"]
    speeds = {"1": 100.0, "2": 200.0, "4": 300.0}
    start = Fake(speed=lambda words: speeds[next(w.split("=")[1] for w in words if "micro_batch_size" in w)])
    assert main(words, start) == 0
    path = next(Path().rglob("points.json"))
    whole = json.loads(path.read_text())
    for file in path.parent.glob("*.run"):  # as if it had ended before the run itself
        file.unlink()
    for tried, following in [
        ({"1": 100.0, "2": 200.0}, ["4", "N"]),
        ({"1": 100.0, "2": 200.0, "4": 300.0}, ["4"]),
        ({"1": 100.0, "2": 90.0}, ["1"]),
    ]:
        entry = whole["points"][0] | {"tried": tried, "chosen": [], "run_dir": None}
        path.write_text(json.dumps(whole | {"points": [entry]}))
        _, lines = shown(words, start, capsys)
        micros = [[w.split("=")[1] for w in line if w.startswith("train.micro_batch_size")] for line, _ in lines]
        assert [sizes[-1] for sizes in micros] == following
