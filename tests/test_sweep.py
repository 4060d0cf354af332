"""Sweeps: the grid, its checks before the start, what is stored, fairness, and two real points."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.sweep import main
from launch.sweeping.grid import check_all, expand
from tests.fake_sweep import Fake
from train.command import cli
from train.command.cli import configured

REPO = Path(__file__).resolve().parent.parent
TINY = ["train.steps=2", "model.num_layers=2", "train.eval_every=0", "train.eval_batches=1", "train.seq_len=32"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.sweep.path_of", lambda script: Path(script).name)  # of this folder, not the program


def state():
    (path,) = Path("runs").glob("sweep-*/points.json")
    return json.loads(path.read_text())


def statuses():
    return {point["label"]: point["status"] for point in state()["points"]}


@pytest.mark.timeout(120)
def test_every_invalid_point_is_told_and_nothing_started(capsys):
    words = ["strategy=dp,single,foo", "nproc=2", "train.global_batch_size=4,5"]
    start = Fake()
    with pytest.raises(SystemExit) as end:
        main(words, start)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.count("nothing was trained") == 1
    assert "5 of 6 point(s)" in said
    assert "  dp train.global_batch_size=5\n    train.global_batch_size=5 is not divisible by" in said
    assert (
        "  foo train.global_batch_size=4, foo train.global_batch_size=5\n    strategy=foo does not name a preset"
        in said
    )
    assert "strategy=single runs on 1 process" in said
    assert not start.started
    assert not Path("runs").exists()

    assert main([*words, "skip_invalid=true"], start) == 0
    assert [words[0] for words, _ in start.started] == ["strategy=dp"]
    assert sorted(statuses().values()) == ["done", *["invalid"] * 5]
    assert "strategy=foo does not name a preset" in capsys.readouterr().out


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("strategy=dp,tp train.stepss=1", 2, "every point\n    train.stepss is not a key"),
        ("strategy=dp,tp runtime.device=teapot", 3, "every point\n    runtime.device=teapot"),
        ("strategy=dp,tp data=text", 2, "every point\n    data=text needs a path"),
        ("batch=large", 2, "batch must be global, micro or best: use batch=micro"),
        ("metrics.dir=a,b", 2, "a sweep has one folder"),
        ("batch=micro train.global_batch_size=8,16", 2, "batch=micro sets it"),
        ("--cfg job", 2, "launch.local --cfg job"),
    ],
)
def test_bad_lines(line, code, says, capsys):
    start = Fake()
    with pytest.raises(SystemExit) as end:
        main(line.split(), start)
    assert (end.value.code, start.started) == (code, [])
    assert says in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_a_failed_point_does_not_end_the_sweep_and_is_run_again(capsys):
    words = ["strategy=dp,fsdp,tp", "nproc=2"]
    start = Fake(bad=["strategy=fsdp"])
    assert main(words, start) == 1
    assert statuses() == {"dp": "done", "fsdp": "failed", "tp": "done"}
    out = capsys.readouterr().out
    assert "[2/3] fsdp ... failed, exit code 1" in out
    assert "    why it failed" in out
    assert "torch/distributed/elastic" not in out
    assert "1 failed (fsdp)" in out
    assert out.splitlines()[-1] == "python compare.py runs/run-0 runs/run-2"
    start.bad = []
    assert main(["strategy=tp,fsdp,dp", "nproc=2"], start) == 0  # the same points, typed in another order
    assert [words[0] for words, _ in start.started[3:]] == ["strategy=fsdp"]
    assert main([*words, "fresh=true"], start) == 0
    assert len(start.started) == 7


@pytest.mark.timeout(120)
def test_it_ends_with_the_comparison(tmp_path):
    (tmp_path / "compare.py").write_text("import sys; open('compared', 'w').write(' '.join(sys.argv[1:]))")
    assert main(["strategy=dp,tp", "nproc=2"], Fake()) == 0
    assert (tmp_path / "compared").read_text() == "runs/run-0 runs/run-1"


@pytest.mark.timeout(120)
def test_a_sweep_goes_on_where_it_was_broken_off(capsys):
    words = ["strategy=dp,fsdp,tp", "nproc=2"]

    class Broken(Fake):
        def __call__(self, overrides, nproc, log, told):
            code = super().__call__(overrides, nproc, log, told)
            if "strategy=fsdp" in overrides:  # it had just written its summary
                raise KeyboardInterrupt
            return code

    with pytest.raises(SystemExit) as end:
        main(words, Broken())
    assert end.value.code == 130
    assert statuses() == {"dp": "done", "fsdp": "running", "tp": "waiting"}
    start = Fake()
    assert main(words, start) == 0
    assert [words[0] for words, _ in start.started] == ["strategy=tp"]
    assert "2 done before" in capsys.readouterr().out

    (Path(state()["points"][0]["run_dir"]) / "summary.json").unlink()  # a run that was thrown away is made again
    assert main(words, start) == 0
    assert [words[0] for words, _ in start.started[1:]] == ["strategy=dp"]


@pytest.mark.timeout(120)
def test_fixed_micro_batch_scales_the_global_one():
    words = ["strategy=dp,tp,fsdp_tp", "nproc=4", "train.micro_batch_size=2", "train.global_batch_size=32"]
    checked = check_all(cli.parser("test", ""), expand(words), "micro")
    plans = [one.plan for one in checked if one.plan is not None]
    assert [plan.config.train.global_batch_size for plan in plans] == [32, 8, 16]
    assert {plan.num_microbatches for plan in plans} == {4}
    assert {plan.config.train.micro_batch_size for plan in plans} == {2}
    assert not any(one.problems for one in checked)
    assert [one.point.overrides[-1] for one in checked] == [f"train.global_batch_size={n}" for n in (32, 8, 16)]
    assert configured(checked[1].point.overrides).train.global_batch_size == 8, "the later word is the one that counts"
    start = Fake()
    assert main([*words, "batch=micro"], start) == 0
    assert state()["fairness"] == "micro"


@pytest.mark.timeout(120)
def test_best_micro_batch_is_run_and_its_measurements_kept(capsys):
    def speed(words):  # dp rises up to 8, tp does not run at all
        size = int([word for word in words if word.startswith("train.micro_batch_size=")][-1].partition("=")[2])
        return None if "strategy=tp" in words else min(size, 8) * 100.0

    words = ["strategy=dp,tp", "nproc=2", "batch=best", "train.micro_batch_size=2", "runtime.device=cpu"]
    start = Fake(speed=speed)
    assert main(words, start) == 1
    dp, tp = state()["points"]
    assert state()["fairness"] == "best"
    assert dp["tried"] == {"2": 200.0, "4": 400.0, "8": 800.0, "16": 800.0}
    # 8 rows of 2 ranks and 2 each: 2 microbatches, as before
    assert dp["chosen"] == ["train.micro_batch_size=8", "train.global_batch_size=32"]
    assert (tp["status"], tp["chosen"]) == ("failed", [])
    final = configured(start.started[4][0])
    assert (final.train.micro_batch_size, final.train.global_batch_size, final.train.steps) == (8, 32, 100)
    assert final.metrics.dir == "runs"
    probe = configured(start.started[0][0])
    assert probe.train.steps < 10
    assert Path(probe.metrics.dir).parent.name.startswith("sweep-")
    before = len(start.started)
    assert main(words, start) == 1
    assert len(start.started) == before + 1, "only what did not run is tried again"
    assert "why it failed" in capsys.readouterr().out


def command(*words):
    return [sys.executable, "-m", "launch.sweep", "strategy=dp,fsdp", "nproc=2", "runtime.device=cpu", *words]


ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_real_points():
    run = subprocess.run(command(*TINY), env=ENV, capture_output=True, text=True, timeout=250)
    assert run.returncode == 0, run.stdout + run.stderr
    assert statuses() == {"dp": "done", "fsdp": "done"}
    works = []
    for point in state()["points"]:
        path = Path(point["run_dir"])
        summary = json.loads((path / "summary.json").read_text())
        work = json.loads((path / "work.json").read_text())
        assert (summary["strategy"], work["strategy"]) == (point["label"], point["label"])
        assert summary["work_hash"] == work["work_hash"]
        speed = f"{point['seconds']:.1f} s, {summary['perf/tokens_per_s']:,.0f} tok"
        assert re.search(rf"{point['label']} \.\.\. (step \d/2 \.\.\. )*{re.escape(speed)}", run.stdout)
        works.append(work["work"])
    assert works[0] == works[1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_no_rank_behind_and_a_state_to_go_on_from(tmp_path):
    process = subprocess.Popen(
        command(*TINY, "train.steps=100000"),
        env=ENV,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job ignores
    )
    deadline = time.monotonic() + 120
    while not list(Path("runs").glob("dp-*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "0 of 2 done" in out
    assert statuses() == {"dp": "running", "fsdp": "waiting"}
    (metrics,) = Path("runs").glob("dp-*/metrics.jsonl")
    size = metrics.stat().st_size
    time.sleep(2)
    assert metrics.stat().st_size == size, "a rank still trains"
