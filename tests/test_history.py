"""What a run keeps of its steps, what a sweep says meanwhile, and what a comparison says at the end."""

import random
import statistics

import numpy as np
import pytest

from launch.sweeping import progress
from scripts.comparing import words
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of
from tests.synthetic_runs import make_run
from tests.test_compare import compare
from train.measure.quantiles import EXACT, Tally, median_interval, quantile
from train.measure.results import Results


def record(ms, **more):
    return {"perf/step_ms": ms, "memory/peak_allocated_gib": ms / 100, "train/loss": ms, **more}


def test_medians_are_of_the_steps_after_warm_up_that_were_not_recorded():
    history = Results(warmup_steps=2)
    assert quantile(history.measured("perf/step_ms"), 0.5) is None
    for ms in (900.0, 500.0):
        history.add(record(ms))
    assert quantile(history.measured("perf/step_ms"), 0.5) == 700.0, "all, while there are no better ones"
    history.add(record(300.0, **{"time/step_ms": 300.0}))
    assert quantile(history.measured("perf/step_ms"), 0.5) == 500.0
    for ms in (100.0, 104.0, 101.0):
        history.add(record(ms))
    history.add(record(400.0, **{"time/step_ms": 400.0}))
    assert quantile(history.measured("perf/step_ms"), 0.5) == 101.0
    assert history.latest["train/loss"] == 400.0
    assert history.largest == {"memory/peak_allocated_gib": 9.0}
    assert history.last("time/") == {"time/step_ms": 400.0}


@pytest.mark.timeout(60)
def test_a_long_run_is_kept_in_bounded_memory_and_its_statistics_are_right():
    generator = random.Random(0)
    values = [generator.lognormvariate(5, 0.1) for _ in range(60_000)]
    history = Results(warmup_steps=0)
    for value in values:
        history.add({"perf/step_ms": value})
    tally = history.measured("perf/step_ms")
    assert len(tally.counts) <= EXACT / 2 and sum(tally.counts.values()) == len(values)
    for share in (0.05, 0.5, 0.95):
        assert quantile(tally, share) == pytest.approx(float(np.quantile(values, share)), rel=6e-4)
    low, high = median_interval(tally)
    exact_low, exact_high = median_interval(values)
    middle = quantile(tally, 0.5)
    assert low is not None and middle is not None and high is not None
    assert low == pytest.approx(exact_low, rel=6e-4) and high == pytest.approx(exact_high, rel=6e-4)
    assert low <= middle <= high


def test_a_tally_is_exact_while_it_can_be():
    values = [random.Random(i).random() for i in range(1001)]
    tally = Tally(values)
    assert quantile(tally, 0.5) == statistics.median(values)
    assert [quantile(tally, share) for share in (0.0, 0.31, 1.0)] == [quantile(values, s) for s in (0.0, 0.31, 1.0)]
    assert median_interval(tally) == median_interval(values)
    assert median_interval(Tally()) == (None, None)


def test_a_point_shows_how_far_it_has_come(tmp_path, capsys, monkeypatch):
    told, log, run = tmp_path / "tp.run", tmp_path / "tp.log", tmp_path / "run"
    watch = progress.Progress(told, log)
    assert watch.text() == "", "nothing is told yet"
    run.mkdir()
    told.write_text(f"{run}\n")
    log.write_text("step   1/100  loss 5.0\n")
    (run / "metrics.jsonl").write_text('{"step": 39, "time": 1}\n{"step": 40, "time": 2, "train/loss": 1}\n{"ste')
    assert watch.text() == "step 40/100"
    watch.show()
    assert capsys.readouterr().out == "", "not every second"
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    watch.show()
    watch.show()
    assert capsys.readouterr().out == "step 40/100 ... "
    watch.in_place, watch.shown = True, "step 100000"
    watch.show()
    assert capsys.readouterr().out == "\b" * 11 + "step 40/100"
    watch.clear()
    assert capsys.readouterr().out == "\b" * 11 + " " * 11 + "\b" * 11


@pytest.mark.timeout(60)
def test_a_comparison_ends_with_the_reports_sentences(tmp_path):
    make_run(tmp_path, "single", world=1, ms=200.0)
    make_run(tmp_path, "dp")
    (group,) = groups_of(Search([tmp_path]).runs)
    last = compare(tmp_path).splitlines()[-1]
    assert last == " ".join([*words.summary(group), words.losses(group)])
    assert last.startswith("dp is fastest: ") and "The loss curves lie on one another" in last
    make_run(tmp_path, "tp", work_hash="bbbbbbbb", work={"train.seed": 5})
    first, second = compare(tmp_path).splitlines()[-2:]
    assert first.startswith("Same work: tiny") and ": dp is fastest" in first
    assert second.startswith("Other work, not comparable with the first table: train.seed 5")
