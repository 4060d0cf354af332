"""The kill loop: its prediction, against runs that are played with random numbers, and a short real one."""

import json
import random
import subprocess
import time

import pytest

from scripts import soak
from scripts.soaking import costs as costs_module
from scripts.soaking import run as run_module
from scripts.soaking.costs import Costs
from scripts.soaking.run import Run, quiet_step

COSTS = Costs(step=0.1, save=0.2, late=0.0, restart=5.0)


def played(costs, every, mtbf, saves, chance):
    """The share of useful time of a run that is killed at random moments, also while it restarts."""
    clock, due = 0.0, chance.expovariate(1 / mtbf)
    for _ in range(saves):
        left = every * costs.step + costs.save
        while clock + left > due:
            clock, due = due, due + chance.expovariate(1 / mtbf)
            left = every * costs.step + costs.save + costs.restart + costs.late
        clock += left
    return saves * every * costs.step / clock


@pytest.mark.parametrize("mtbf", [20, 60, 300])
@pytest.mark.parametrize("late", [0.0, 1.0])
def test_the_prediction_is_that_of_played_runs(late, mtbf):
    costs = Costs(COSTS.step, COSTS.save, late, COSTS.restart)
    every = costs.every(mtbf)
    found = played(costs, every, mtbf, 20_000, random.Random(1))
    assert costs.ettr(every, 1 / mtbf) == pytest.approx(found, abs=0.01)
    for other in (every // 4, every * 4):
        assert costs.ettr(other, 1 / mtbf) < costs.ettr(every, 1 / mtbf), "Young's interval is the best one"


def test_without_kills_only_saves_cost():
    assert COSTS.ettr(10, 0.0) == pytest.approx(1 / 1.2)
    assert COSTS.ettr(10, 1e-9) == pytest.approx(1 / 1.2)


def test_the_time_of_a_step_is_that_between_saves_and_kills():
    """A record is written when the next step has been made, but that of a saved step, 5 or 10, at once."""
    times = {1: 0.0, 2: 9.0, 3: 10.0, 4: 11.0, 5: 11.0, 6: 29.0, 7: 30.0, 8: 31.0, 9: 51.0, 10: 51.0, 11: 90.0}
    found = [{"step": step, "time": at} for step, at in times.items()]
    assert quiet_step(found, 5, kills=[60.0]) == pytest.approx((1 + 1 + 1 + 20) / 4)
    assert quiet_step(found, 5, kills=[40.0, 60.0]) == pytest.approx(1.0), "a rank was killed while step 9 was made"
    assert quiet_step(found[:2], 5, kills=[5.0]) == 9.0, "no such step"


def test_a_run_may_last_as_long_as_it_makes_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "PATIENCE_S", 0.3)
    monkeypatch.setattr(run_module, "POLL_S", 0.01)
    run = Run.__new__(Run)
    run.folder, run.process = tmp_path, subprocess.Popen(["sleep", "2"])
    (tmp_path / "log").write_text("the log of the run")
    metrics = tmp_path / "runs" / "one" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    started = time.monotonic()

    def writes_for_a_second():
        passed = time.monotonic() - started
        if passed < 1:
            metrics.write_text(json.dumps({"step": int(10 * passed) + 1, "train/loss": 1.0, "time": 0.0}) + "\n")
        return passed > 1

    assert run.until(writes_for_a_second), "longer than the patience"
    with pytest.raises(SystemExit, match="does not go on:\nthe log of the run"):
        run.until(lambda: False)
    assert run.process.poll() is None, "it was given up because it made no step"
    run.process.kill()
    with pytest.raises(SystemExit):
        run.until(lambda: False)
    assert run.until(lambda: run.process.wait() != 0), "what happens at the end is not missed"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_short_soak(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, value in [("CYCLE", 10), ("CYCLES", 3), ("KILLS", 1)]:
        monkeypatch.setattr(costs_module, name, value)
    line = ["strategy=fsdp", "nproc=2", "minutes=0.05", "mtbf_s=35", "runtime.device=cpu"]
    line += ["model.num_layers=2", "model.dim=64", "train.seq_len=64"]
    assert random.Random("fsdp 35.0").random() < 0.2, "the only kill is early enough"
    assert soak.main(line) == 0, capsys.readouterr()
    (result,) = map(json.loads, (tmp_path / "build" / "soak.jsonl").read_text().splitlines())
    assert result["equal"] and result["kills"] >= 1 and result["mttr_s"] > 0
    assert 0 < result["ettr"] < 1 and 0 < result["predicted"] < 1
    assert not [*(tmp_path / "build" / "soak").iterdir()], "nothing is left of a strategy that is finished"
    said = capsys.readouterr().out
    assert "the losses are those of the undisturbed run" in said and "a restart" in said
    monkeypatch.setattr(soak, "prepared", None)
    assert soak.main(line) == 0, "it is not run again"
