"""What a run keeps of its steps, what a sweep shows while it runs, and what a comparison shows at the end."""

import json
import random
import statistics

import numpy as np
import pytest

from launch.start import progress
from scripts.benching import results as bench_results
from scripts.comparing import words
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of
from scripts.comparing.results import figures_of
from scripts.comparing.runs import read_run
from tests.synthetic_runs import SAMPLED, make_run
from tests.test_compare import compare
from train.measure.quantiles import EXACT, Tally, median_interval, quantile
from train.measure.results import AT_PEAK, Results, by_axis, memory_at_peak
from train.record import board


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


def test_what_counts_is_the_same_for_all_who_read_a_run(tmp_path):
    """Summary, TensorBoard, compare and the benchmarks give the same results, also with warm-up and recorded steps."""
    run = make_run(tmp_path / "runs", "tp", steps=14)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    live, standing = Results(5), board.ResultsSoFar(5)
    for line in lines:
        shown = standing.add(line)
        live.add(line)
    times = [100.0 + n for n in range(6, 15) if n != SAMPLED]
    median, speed = statistics.median(times), statistics.median(1e6 / ms for ms in times)
    figures, row = figures_of(read_run(run)), bench_results.run_figures(run)
    assert live.spread()["perf/step_ms_p50"] == figures["step_ms_p50"] == row["perf/step_ms"] == median
    assert live.median("perf/tokens_per_s") == figures["tokens_per_s"] == row["perf/tokens_per_s"] == speed
    assert (shown["result/step_ms"], shown["result/tokens_per_s"]) == (median, speed)
    assert live.spread()["measured_steps"] == live.num_measured == row["steps_measured"] == len(times)
    assert shown["result/sent_mib"] == figures["sent_mib_per_step"] == sum(by_axis(row).values()) == 4.5
    assert shown["result/held_mib"] == figures["state_mib"] == 8.0
    assert shown["result/peak_tensors_mib"] == figures["tensors_mib"] == sum(memory_at_peak(row).values()) == 14.0
    assert shown["result/exposed_communication_pct"] == figures["exposed_comm_pct"] == pytest.approx(100 * 20 / 120)


def test_recorded_steps_in_warmup_count_only_while_there_are_no_later_ones():
    results = Results(warmup_steps=2)
    for ms in (10.0, 20.0, 30.0, 40.0):
        results.add(record(ms, **{"time/step_ms": ms, "memory_at_peak/gradients_mib": ms}))
        if ms == 20.0:
            assert results.recorded("time/step_ms").counts == {20.0: 1}, "the last one before"
    assert results.recorded("time/step_ms").mean() == 35.0
    assert quantile(results.recorded(AT_PEAK), 1.0) == 40.0
    assert (results.num_steps, results.num_recorded, results.num_measured) == (4, 4, 0)
    results.add({"validation/loss": 3.0})
    assert results.num_steps == 4 and results.latest["validation/loss"] == 3.0, "an evaluation is no step"
    assert results.settled == {"memory/peak_allocated_gib": 0.4} and results.largest == results.settled


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
    assert last.startswith("dp is fastest: ") and "The loss curves are the same" in last
    make_run(tmp_path, "tp", work_hash="bbbbbbbb", work={"train.seed": 5})
    first, second = compare(tmp_path).splitlines()[-2:]
    assert first.startswith("Same work: tiny") and ": dp is fastest" in first
    assert second.startswith("Other work, not comparable with the first table: train.seed 5")
