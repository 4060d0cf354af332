"""scripts/compare.py on run directories that the tests write, so that all figures are known."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.comparing import table
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of
from scripts.comparing.results import figures_of, memory_by_rank
from scripts.comparing.runs import read_run
from tests.synthetic_runs import MODEL, make_run
from train.config.world import World
from train.measure.quantiles import median_interval, quantile
from train.record.run_dir import sweep_of

OTHER = {"model": MODEL | {"num_layers": 4}}
POWERSGD = ", dp_replicate: -1, comm_hook: powersgd"
COMPARE = Path(__file__).resolve().parent.parent / "scripts" / "compare.py"


def compare(*arguments, code=0):
    run = subprocess.run(
        [sys.executable, str(COMPARE), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == code, run.stderr
    return run.stdout if code == 0 else run.stderr


def by_label(*paths):
    return {row.run.label: row for group in groups_of(Search(list(paths)).runs) for row in group.rows}


def test_figures_are_of_the_steps_after_warm_up_without_the_sampled_one(tmp_path):
    figures = figures_of(read_run(make_run(tmp_path, "tp")))
    times = [106.0, 107.0, 108.0, 109.0, 111.0, 112.0]  # step 10 was sampled
    assert figures["step_ms_p50"] == 108.5
    assert figures["step_ms_p95"] == pytest.approx(111.75)
    speeds = [1e6 / ms for ms in times]
    assert (figures["tokens_per_s_ci95_low"], figures["tokens_per_s_ci95_high"]) == (min(speeds), max(speeds))
    assert figures["sent_mib_per_step"] == 4.5, "the lab's own traffic is not the strategy's"
    assert figures["exposed_comm_pct"] == pytest.approx(100 * 20 / 120)
    assert (figures["state_mib"], figures["tensors_mib"], figures["allocated_mib"]) == (8.0, 14.0, None)
    assert figures["resident_mib"] == 256.0
    assert figures["bubble_pct"] is None and figures["mfu_pct"] is None, "not measured is not 0"


@pytest.mark.parametrize("n, k", [(6, 1), (9, 2), (10, 2), (30, 10), (95, 38)])
def test_interval_leaves_out_as_much_as_the_binomial_allows(n, k):
    values = list(range(1, n + 1))
    assert median_interval(values[::-1]) == (k, n + 1 - k)
    outside = 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
    assert outside <= 0.05 < outside + 2 * math.comb(n, k) / 2**n
    assert median_interval(values[:5]) == (None, None)
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0


def test_loss_is_gated_by_precision_against_single(tmp_path):
    make_run(tmp_path, "dp", off=2e-7)
    make_run(tmp_path, "fsdp", off=0.05)
    make_run(tmp_path, "hsdp", off=0.05, keys=POWERSGD)
    make_run(tmp_path, "pp", off=float("nan"))
    make_run(tmp_path, "single", world=1)
    rows = by_label(tmp_path)
    assert rows["single"].equal == "reference"
    assert rows["dp"].equal == "yes (5.3e-08)" and rows["dp"].good
    assert rows["fsdp"].equal == "loss differs (1.3e-02)" and not rows["fsdp"].good
    assert rows["hsdp"].equal.startswith("loss differs (1.3e-02), which is allowed") and rows["hsdp"].good
    assert not rows["pp"].good, "a loss that is no number equals nothing"
    (group,) = groups_of(Search([tmp_path]).runs)
    best = table.best(group, "tokens_per_s")
    assert best is not None and best.run.label != "fsdp"


@pytest.mark.parametrize("precision, equal", [("float64", False), ("float32", True), ("bf16", True)])
def test_bound_follows_the_precision(tmp_path, precision, equal):
    make_run(tmp_path, "dp", precision=precision)
    make_run(tmp_path, "tp", precision=precision, off=1e-4)
    assert by_label(tmp_path)["tp"].good is equal


def test_other_work_stands_apart_and_says_what_differs(tmp_path):
    for strategy in ("dp", "tp"):
        make_run(tmp_path, strategy)
    make_run(tmp_path, "pp", work=OTHER, off=1.0)
    make_run(tmp_path, "fsdp", known=False)
    same, other, unknown = groups_of(Search([tmp_path]).runs)
    assert [row.run.strategy for row in same.rows] == ["dp", "tp"]
    assert other.heading == "Other work, not comparable with the first table: model.num_layers 4, not 2"
    assert other.rows[0].equal == "-", "alone in its table"
    assert unknown.heading.startswith("Work unknown") and unknown.rows[0].equal == "-"


def test_a_sweep_of_other_batches_is_compared_by_speed_alone(tmp_path):
    sweep = tmp_path / "sweep-1"
    make_run(sweep, "dp", ms=100.0)
    make_run(sweep, "tp", work=OTHER, off=1.0)
    (sweep / "points.json").write_text(json.dumps({"fairness": "micro", "points": []}))
    for paths in ([tmp_path], sorted(sweep.glob("*-ws2-*"))):
        (group,) = groups_of(Search(paths).runs)
        assert group.heading == "Different batch: speed only (sweep-1, batch=micro)"
        assert [row.equal for row in group.rows] == ["-", "-"]


def test_sweeps_of_other_batches_stand_apart_from_each_other(tmp_path):
    for name, fairness in (("sweep-1", "micro"), ("sweep-2", "best")):
        (tmp_path / name).mkdir()
        runs = [make_run(tmp_path, f"{strategy}{name[-1]}") for strategy in ("dp", "tp")]
        points = [{"label": run.name, "run_dir": f"runs/{run.name}"} for run in runs]
        (tmp_path / name / "points.json").write_text(json.dumps({"fairness": fairness, "points": points}))
    groups = groups_of(Search([tmp_path]).runs)
    assert sorted(group.heading.split(": ")[1] for group in groups) == [
        "speed only (sweep-1, batch=micro)",
        "speed only (sweep-2, batch=best)",
    ]


def test_the_reference_is_a_run_that_must_be_equal(tmp_path):
    make_run(tmp_path, "dp", off=0.05, keys=POWERSGD)
    make_run(tmp_path, "tp")
    rows = by_label(tmp_path)
    assert rows["tp"].equal == "reference"
    assert rows["dp"].equal.endswith("allowed: strategy.comm_hook=powersgd rounds gradients before they are sent")
    assert rows["dp"].good


def test_a_lossy_run_is_held_to_its_bound(tmp_path):
    fp16 = ", dp_replicate: -1, comm_hook: fp16"
    make_run(tmp_path, "tp")
    make_run(tmp_path, "dp", off=0.006, keys=fp16)
    make_run(tmp_path, "fsdp", off=0.05, keys=fp16)
    make_run(tmp_path, "hsdp", off=float("nan"), keys=POWERSGD)
    rows = by_label(tmp_path)
    assert rows["dp"].equal.startswith("yes (1.6e-03)")
    assert rows["fsdp"].equal == "loss differs (1.3e-02)" and not rows["fsdp"].good
    assert rows["hsdp"].equal == "loss differs (inf)" and not rows["hsdp"].good


def test_runs_that_a_sweep_names_belong_to_it_wherever_they_are(tmp_path):
    run = make_run(tmp_path, "dp")
    make_run(tmp_path, "tp", work=OTHER)
    (tmp_path / "sweep-1").mkdir()
    points = [
        {"label": "dp", "run_dir": f"runs/{run.name}", "status": "done"},
        {"label": "pp", "run_dir": None, "status": "failed"},
    ]
    (tmp_path / "sweep-1" / "points.json").write_text(json.dumps({"fairness": "best", "points": points}))
    assert [(r.strategy, r.fairness) for r in Search([tmp_path / "sweep-1"]).runs] == [("dp", "best")]
    assert [(r.strategy, r.fairness) for r in Search([tmp_path]).runs] == [("dp", "best"), ("tp", "global")]
    assert "  pp: failed\n" in compare(tmp_path)


@pytest.mark.parametrize("told", ["sweep-1", "elsewhere/sweep-1", None, "", "..", "sweep-2", "a\0b", "sweep-1/../.."])
def test_work_json_names_the_sweep_and_no_folder_beside_it_is_searched(tmp_path, told):
    run = make_run(tmp_path / "runs", "dp")
    work = json.loads((run / "work.json").read_text())
    (run / "work.json").write_text(json.dumps(work | {"sweep": told}))
    for folder in (tmp_path, tmp_path / "runs" / "sweep-1", tmp_path / "runs" / "sweep-3"):
        folder.mkdir(exist_ok=True)
        points = [{"label": "dp", "run_dir": f"runs/{run.name}"}] if folder.name == "sweep-3" else []
        (folder / "points.json").write_text(json.dumps({"fairness": "best", "points": points}))
    (found,) = Search([run]).runs
    expected = tmp_path / "runs" / "sweep-1" if told in ("sweep-1", "elsewhere/sweep-1") else None
    assert (found.sweep and found.sweep.folder) == expected
    assert found.fairness == ("best" if expected else "global")


def test_a_run_knows_the_sweep_that_started_it():
    started = World(0, 0, 2, 2, from_torchrun=True, run_file="/somewhere/runs/sweep-1a2b3c/dp.run")
    assert sweep_of(started) == "sweep-1a2b3c"
    assert sweep_of(World.single()) is None


def test_state_by_rank_is_known_of_a_run_that_ended_without_a_sample(tmp_path):
    run = read_run(make_run(tmp_path, "dp", samples=False))
    assert run.validations, "its line comes after the last step's"
    assert memory_by_rank(run) == {rank: {"parameters": 2.0, "gradients": 2.0, "optimiser": 4.0} for rank in (0, 1)}


def test_a_run_that_was_cut_off(tmp_path):
    path = make_run(tmp_path, "tp", steps=9, finished=False, samples=False)
    whole = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(whole + whole.splitlines()[-1][:40])
    (tmp_path / "pp-pp2-ws2-000000").mkdir()
    (tmp_path / "pp-pp2-ws2-000000" / "config.yaml").write_text("strategy: {name: pp}\ntrain: {steps: 9}\n")
    run = read_run(path)
    assert len(run.steps) == 9 and run.status == "running or stopped at step 9 of 9"
    out = compare(tmp_path)
    assert "tp: running or stopped at step 9 of 9" in out
    assert "pp: running or stopped at step 0 of 9" in out
    assert "interval" in out and "metrics.profile_every" in out


def test_event_file_alone_is_read(tmp_path):
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    path = make_run(tmp_path, "tp")
    expected = figures_of(read_run(path))
    writer = EventFileWriter(str(path))
    for line in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()):
        step, when = line.pop("step"), line.pop("time")
        entries = [Summary.Value(tag=tag, simple_value=value) for tag, value in line.items()]
        writer.add_event(Event(step=step, wall_time=when, summary=Summary(value=entries)))
    writer.close()
    (path / "metrics.jsonl").unlink()
    found = figures_of(read_run(path))
    assert {k for k, v in found.items() if v is None} == {k for k, v in expected.items() if v is None}
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-6)), name
