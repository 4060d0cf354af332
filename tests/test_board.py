"""What TensorBoard gets: the same columns for every strategy, charts of existing tags, all values of a killed run."""

import os
import random
import signal
import statistics
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata

from tests.board_runs import FIGURES, SAMPLED, STEPS, config_of, validation_loss, values_of, write_run
from train.record import board
from train.record.tags import logged_as, shown_as

# Tags of metrics.jsonl and what TensorBoard calls them: the first groups as they are, what explains them behind.
SHOWN_AS = {
    "result/tokens_per_s": "result/tokens_per_s", "train/loss": "train/loss", "train/grad_norm": "train/grad_norm",
    "train/lr": "train/lr", "validation/loss": "validation/loss", "perf/tokens_per_s": "perf/tokens_per_s",
    "memory/parameters_mib": "memory/parameters_mib", "comm/tp/all_gather_mib": "why/comm/tp/all_gather_mib",
    "comm/dp_shard.cp/reduce_scatter_mib": "why/comm/dp_shard.cp/reduce_scatter_mib",
    "time/forward_ms": "why/time/forward_ms", "pipeline/bubble_pct": "why/pipeline/bubble_pct",
    "memory_at_peak/activations_mib": "why/memory_at_peak/activations_mib", "moe/load_max": "why/moe/load_max",
    "energy/joules_per_step": "why/energy/joules_per_step", "stragglers/slowest_rank": "why/stragglers/slowest_rank",
    "memory_by_rank/parameters_mib/rank_0": "why_by_rank/parameters_mib/rank_0",
}  # fmt: skip


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Switches off the drawing of pictures, which has its own tests."""
    monkeypatch.setattr("train.record.sinks.find_spec", lambda name: None)


def read(path):
    return EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def columns_of(events):
    content = events.summary_metadata[metadata.EXPERIMENT_TAG].plugin_data.content
    experiment = metadata.parse_experiment_plugin_data(content)
    return [(h.name, h.type, h.differs) for h in experiment.hparam_infos], [m.name.tag for m in experiment.metric_infos]


def hparams_of(events):
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    start = metadata.parse_session_start_info_plugin_data(content)
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}


def test_every_strategy_has_the_same_columns(tmp_path):
    runs = {strategy: read(write_run(tmp_path, strategy, steps=2)) for strategy in FIGURES}
    first = columns_of(runs["single"])
    assert {name for name, _, differs in first[0] if differs} == set(board.FIRST_COLUMNS)
    assert first[1] == list(board.RESULTS)
    for strategy, events in runs.items():
        assert columns_of(events) == first
        hparams = hparams_of(events)
        assert hparams.keys() == {name for name, _, _ in first[0]}
        assert {kind for _, kind, _ in first[0]} == {api_pb2.DATA_TYPE_STRING}  # a number would be 4.0000
        assert hparams["strategy"] == strategy
        assert hparams["world_size"].strip() == str(FIGURES[strategy][0])
        assert hparams["lr"] == "0.001"
    degrees = {strategy: {a: int(hparams_of(e)[a]) for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
               for strategy, e in runs.items()}  # fmt: skip
    ones = dict.fromkeys(("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep"), 1)
    assert degrees == {
        "single": ones, "dp": ones | {"dp_replicate": 4}, "pp": ones | {"pp": 4},
        "3d": ones | {"pp": 2, "dp_shard": 2, "tp": 2}, "ds_zero1": ones | {"dp_shard": 4},
    }  # fmt: skip
    schedules = {strategy: hparams_of(events)["schedule"] for strategy, events in runs.items()}
    assert schedules == {"single": "-", "dp": "-", "pp": "1f1b", "3d": "1f1b", "ds_zero1": "-"}
    assert hparams_of(runs["3d"])["layout"] == "pp2 dp_shard2 tp2"
    ep = board.hparams(config_of("ep", "model=moe_tiny"), 4, "cpu")
    assert ep["ep"] == 4
    assert list(ep) == [name for name, _, _ in first[0]]
    assert sorted(board.as_text(n) for n in (16, 4, 128, 2)) == [board.as_text(n) for n in (2, 4, 16, 128)]


def test_results_and_training_stand_before_what_explains_them(tmp_path):
    assert {tag: shown_as(tag) for tag in SHOWN_AS} == SHOWN_AS
    assert [logged_as(tag) for tag in SHOWN_AS.values()] == list(SHOWN_AS)
    groups = {tag.split("/")[0] for tag in read(write_run(tmp_path, "3d")).Tags()["scalars"]}
    # TensorBoard sorts groups by name
    assert sorted(groups) == ["memory", "perf", "result", "train", "validation", "why", "why_by_rank"]


def compare_page(events):
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    assert category.title == "Compare"
    return category


def test_only_pipelines_have_the_chart_of_bubbles(tmp_path):
    titles = {
        strategy: {chart.title for chart in compare_page(read(write_run(tmp_path, strategy, steps=1))).chart}
        for strategy in FIGURES
    }
    assert {strategy for strategy in FIGURES if board.BUBBLE in titles[strategy]} == {"pp", "3d"}
    assert all(found | {board.BUBBLE} == set(board.CHARTS) for found in titles.values())


def test_every_chart_finds_its_tags(tmp_path):
    events = read(write_run(tmp_path, "3d"))
    category = compare_page(events)
    assert [chart.title for chart in category.chart] == list(board.CHARTS)[::-1]
    found = set()
    for chart in category.chart:
        (series,) = chart.margin.series  # with several, runs that lack one are listed as a fault
        steps = [[event.step for event in events.Scalars(tag)] for tag in (series.value, series.lower, series.upper)]
        assert steps[0] == steps[1] == steps[2]  # else the page shows an error in place of the chart
        assert series.value not in found
        found.add(series.value)


def test_no_tag_has_two_values_at_a_step_and_none_is_stale(tmp_path):
    events = read(write_run(tmp_path, "pp"))
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    losses = [(event.step, event.value) for event in events.Scalars("validation/loss")]
    assert losses == [(STEPS // 2, 5.0), (STEPS, pytest.approx(validation_loss("pp")))]
    assert [(event.step, event.value) for event in events.Scalars("result/validation_loss")] == losses


def test_a_sample_stands_for_the_steps_since_the_one_before(tmp_path):
    events, config = read(write_run(tmp_path, "pp")), config_of("pp")
    for tag in ("time/communication_ms", "pipeline/bubble_theory_pct"):
        for event in (shown := events.Scalars(f"why/{tag}")):
            sample = min(step for step in SAMPLED if step >= event.step)
            assert event.value == pytest.approx(values_of("pp", sample, config)[tag])
        assert [event.step for event in shown] == list(range(1, STEPS + 1))
    assert [event.step for event in events.Scalars("why/time/step_ms")] == list(
        SAMPLED
    )  # whoever reads it back relies on it


def test_an_event_file_alone_compares_as_the_run_does(tmp_path):
    from scripts.comparing.results import figures_of
    from scripts.comparing.runs import read_run

    path = write_run(tmp_path, "pp")
    expected = figures_of(read_run(path))
    (path / "metrics.jsonl").unlink()
    found = figures_of(read_run(path))
    assert {name: value for name, value in found.items() if value is None} == dict.fromkeys(
        name for name, value in expected.items() if value is None
    )
    for name, value in expected.items():
        assert value is None or found[name] == pytest.approx(value, rel=1e-6), name
    assert expected["bubble_pct"] and expected["sent_mib_per_step"] and expected["exposed_comm_pct"]


@pytest.mark.parametrize(
    ("before", "step", "expected"),
    [
        (0, 1, [1]), (0, 3, [1, 2, 3]), (10, 15, [11, 12, 13, 14, 15]), (0, 10, list(range(1, 11))),
        (10, 510, list(range(60, 511, 50))), (0, 11, [1, 2, 3, 4, 5, 6, 7, 8, 9, 11]),
    ],
)  # fmt: skip
def test_a_sample_has_few_points_and_its_own_step_is_the_last(before, step, expected):
    assert board.steps_of_sample(before, step) == expected


@pytest.mark.parametrize("warmup_steps", [0, 5, STEPS, STEPS + 3])
def test_results_are_the_medians_of_the_steps_so_far(warmup_steps):
    config, standing = config_of("pp"), board.ResultsSoFar(warmup_steps)
    steps = [values_of("pp", step, config) for step in range(1, STEPS + 1)]
    for number, values in enumerate(steps, start=1):
        results = standing.add(values)
        counted = [had for had in steps[warmup_steps:number] if "time/step_ms" not in had] or steps[:number]
        for name in ("tokens_per_s", "step_ms"):
            median = statistics.median(had[f"perf/{name}"] for had in counted)
            assert results[f"result/{name}"] == pytest.approx(median, rel=1e-12)
    _, _, held, memory_gib, exposed, bubble = FIGURES["pp"]
    known = {"held_mib": held, "memory_gib": memory_gib, "exposed_communication_pct": exposed, "bubble_pct": bubble,
             "sent_mib": 2 * held, "train_loss": steps[-1]["train/loss"], "peak_tensors_mib": held / 4 + 9}  # fmt: skip
    assert results == pytest.approx(results | {f"result/{name}": value for name, value in known.items()})
    assert "result/validation_loss" not in results
    assert standing.results({"validation/loss": 2.5, "perf/step_ms": 7.0})["result/step_ms"] == 7.0


def test_a_long_run_that_changes_its_speed_keeps_its_median():
    """The medians of all steps, except the last 1 %, which may not be included yet."""
    standing, draw = board.ResultsSoFar(0), random.Random(1)
    times = [draw.uniform(90, 110) for _ in range(1000)] + [draw.uniform(190, 210) for _ in range(600)]
    for ms in times:
        results = standing.add({"perf/step_ms": ms})
    medians = [statistics.median(times[:known]) for known in range(len(times) - len(times) // 100, len(times) + 1)]
    assert results["result/step_ms"] in medians and medians[-1] < 110


def test_peaks_are_of_the_whole_run_and_what_is_unknown_is_absent():
    standing = board.ResultsSoFar(0)
    for peak in (2.0, 3.0, 1.0):
        results = standing.add({"perf/step_ms": 5.0, "perf/tokens_per_s": 1.0, "memory/peak_allocated_gib": peak})
    assert results == {"result/tokens_per_s": 1.0, "result/step_ms": 5.0, "result/memory_gib": 3.0}


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.board_runs import write_run
print(write_run(Path(sys.argv[1]), "pp", complete=False, steps=7), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.timeout(90)
def test_a_killed_run_has_its_columns_and_every_step(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=env, capture_output=True, text=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    events = read(run.stdout.strip())
    assert hparams_of(events)["strategy"] == "pp"
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    assert metadata.SESSION_END_INFO_TAG not in events.summary_metadata
    config = config_of("pp")
    for tag in ("train/loss", "perf/step_ms"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [
            (step, pytest.approx(values_of("pp", step, config)[tag])) for step in range(1, 8)
        ]
    assert events.Scalars("result/tokens_per_s")[-1].step == 7


def test_a_complete_run_says_so_and_ends_as_its_summary(tmp_path):
    path = write_run(tmp_path, "dp")
    events = read(path)
    content = events.summary_metadata[metadata.SESSION_END_INFO_TAG].plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == api_pb2.STATUS_SUCCESS
    assert events.Scalars("result/validation_loss")[-1].value == pytest.approx(3.04)
    assert [event.step for event in events.Scalars("result/tokens_per_s")] == list(range(1, STEPS + 1))
    assert {entry.name for entry in path.iterdir() if entry.is_dir()} == {"samples"}, "a run inside the run"
