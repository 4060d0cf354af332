"""What TensorBoard is told: the same columns for every strategy, charts that find the tags, nothing lost in a kill."""

import os
import re
import signal
import statistics
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata

from tests.board_runs import FIGURES, STEPS, config_of, sample_of, values_of, write_run
from train import board
from train.plan import Plan

# One line of metrics.jsonl, of every kind of tag that there may be (axes may be joined), and the chart each belongs to.
TAGS = {
    "perf/tokens_per_s": "throughput: tokens per second",
    "perf/step_ms": "throughput: step, ms",
    "train/loss": "loss: training",
    "validation/loss": "loss: validation",
    "result/held_mib": "memory: held between steps by the largest rank, MiB",
    "memory/resident_gib": "memory: peak allocated on a GPU, resident on a CPU, GiB",
    "memory/peak_allocated_gib": "memory: peak allocated on a GPU, resident on a CPU, GiB",
    "memory_at_peak/activations_mib": "memory: at the peak by kind, MiB",
    "memory_at_peak/untracked_mib": "memory: at the peak by kind, MiB",
    "pipeline/bubble_pct": "pipeline bubble: measured, % of the time",
    "pipeline/bubble_theory_pct": "pipeline bubble: theory and closed form, %",
    "pipeline/bubble_closed_form_pct": "pipeline bubble: theory and closed form, %",
    "comm/tp/all_gather_mib": "communication: sent a step by axis and collective, MiB",
    "comm/dp_shard.cp/reduce_scatter_mib": "communication: sent a step by axis and collective, MiB",
    "time/forward_ms": "step time by part, ms",
    "time/other_ms": "step time by part, ms",
}
ELSEWHERE = (
    "train/grad_norm", "perf/tokens_per_s_per_device", "comm/lab/gather_mib", "comm/tp/all_gather_ms", "time/step_ms",
    "comm/tp/all_gather_calls", "memory_by_rank/parameters_mib/rank_0", "memory/parameters_mib", "moe/load_max",
)  # fmt: skip


@pytest.fixture(autouse=True)
def few_pictures(monkeypatch):
    """Drawing is tested by itself."""
    monkeypatch.setattr("train.sinks.find_spec", lambda name: None)


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
        for name, kind, _ in first[0]:
            assert isinstance(hparams[name], str) == (kind == api_pb2.DATA_TYPE_STRING)
        assert hparams["strategy"] == strategy
        assert hparams["world_size"] == FIGURES[strategy][0]
    degrees = {strategy: {a: hparams_of(e)[a] for a in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")}
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


def test_every_tag_is_in_its_chart(tmp_path):
    events = read(write_run(tmp_path, "dp", steps=1))
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert category.title == "Compare"

    def found(tag):  # as the plug-in does: from the start of the tag
        return [title for title, patterns in charts.items() if any(re.match(pattern, tag) for pattern in patterns)]

    for tag, title in TAGS.items():
        assert found(tag) == [title]
    assert found("time/communication_ms") == ["communication: exposed, ms", "step time by part, ms"]
    assert {title for tag in [*TAGS, "time/communication_ms"] for title in found(tag)} == charts.keys()
    assert not any(found(tag) for tag in ELSEWHERE)


@pytest.mark.parametrize("warmup_steps", [0, 5, STEPS, STEPS + 3])
def test_results_are_the_medians_of_the_steps_so_far(warmup_steps):
    config, standing = config_of("pp"), board.Standing(warmup_steps)
    steps = [values_of("pp", step, config) for step in range(1, STEPS + 1)]
    for number, values in enumerate(steps, start=1):
        results = standing.add(values)
        counted = steps[warmup_steps:number] or steps[:number]
        for name in ("tokens_per_s", "step_ms"):
            assert results[f"result/{name}"] == statistics.median(had[f"perf/{name}"] for had in counted)
    _, _, held, memory_gib, exposed, bubble = FIGURES["pp"]
    known = {"held_mib": held, "memory_gib": memory_gib, "exposed_communication_pct": exposed, "bubble_pct": bubble,
             "sent_mib": 2 * held, "train_loss": steps[-1]["train/loss"]}  # fmt: skip
    assert results == pytest.approx(results | {f"result/{name}": value for name, value in known.items()})
    assert "result/validation_loss" not in results
    assert standing.results({"validation/loss": 2.5, "perf/step_ms": 7.0})["result/step_ms"] == 7.0


def test_peaks_are_of_the_whole_run_and_what_is_unknown_is_absent():
    standing = board.Standing(0)
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
    for tag in ("train/loss", "perf/step_ms", "pipeline/bubble_pct"):
        assert [(e.step, e.value) for e in events.Scalars(tag)] == [
            (step, pytest.approx(values_of("pp", step, config)[tag])) for step in range(1, 8)
        ]
    assert events.Scalars("result/tokens_per_s")[-1].step == 7


def test_a_complete_run_says_so_and_ends_as_its_summary(tmp_path):
    path = write_run(tmp_path, "dp")
    events = read(path)
    content = events.summary_metadata[metadata.SESSION_END_INFO_TAG].plugin_data.content
    assert metadata.parse_session_end_info_plugin_data(content).status == api_pb2.STATUS_SUCCESS
    assert [event.value for event in events.Scalars("result/validation_loss")] == [pytest.approx(3.04)]
    assert (
        len(events.Scalars("result/tokens_per_s")) == STEPS + 1
    )  # the steps and the validation; nothing twice at the end
    assert {entry.name for entry in path.iterdir() if entry.is_dir()} == {"samples"}, "a run inside the run"


def test_figures_of_a_sampled_step(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from train.figures import figures

    config = config_of("3d")
    sample, degrees = sample_of("3d", 4, config), Plan(config, 8).degrees
    drawn = figures(sample, degrees)
    assert list(drawn) == ["figures/timeline", "figures/memory", "figures/mesh"]
    bars = drawn["figures/timeline"].axes[0].patches
    pieces = sorted((start, end - start, row) for row, rank in enumerate(sample["ranks"])
                    for _, _, _, start, end in rank["timeline"])  # fmt: skip
    shown = sorted((bar.get_x(), bar.get_width(), round(bar.get_y() + 0.4)) for bar in bars)
    assert shown == [pytest.approx(piece) for piece in pieces]
    by_kind = [sum(bar.get_width() for bar in drawn["figures/memory"].axes[0].patches)]
    assert by_kind == pytest.approx([sum(sum(r["memory"]["at_peak_mib"].values()) for r in sample["ranks"])])
    labels = [text.get_text() for axes in drawn["figures/mesh"].axes for text in axes.texts]
    assert [label.split("\n")[0] for label in labels] == [f"rank {rank}" for rank in range(8)]
    assert list(figures(sample)) == ["figures/timeline", "figures/memory"]
    for rank in sample["ranks"]:
        rank["timeline"], rank["memory"] = [], {"at_peak_mib": {}, "curve": []}
    assert not figures(sample), "nothing was measured, and yet drawn"


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv_zero_bubble"])
def test_a_timeline_of_several_stages_on_a_rank(schedule):
    pytest.importorskip("matplotlib")
    from train.figures import timeline
    from train.strategies.timetable import UNITS, actions_by_rank
    from train.strategies.timetable import timetable as at_times

    table = at_times(actions_by_rank(schedule, 8, 4, 8), 8)
    ranks = [
        {
            "rank": r,
            "step_ms": 100.0,
            "timeline": [[a.kind, a.stage, a.microbatch, t, t + UNITS[a.kind]] for t, a in row],
        }
        for r, row in enumerate(table.rows)
    ]
    figure = timeline(1, ranks)
    assert len(figure.axes[0].patches) == sum(len(row) for row in table.rows)
    assert {bar.get_alpha() for bar in figure.axes[0].patches} == {0.55, 1.0}


def test_pictures_are_drawn_ever_more_rarely_and_of_the_last_sample(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.undo()
    from train.sinks import TensorBoard

    config = config_of("pp")
    sink = TensorBoard(tmp_path, {}, degrees=Plan(config, 4).degrees)
    for step in range(1, 8):
        sink.sample(10 * step, sample_of("pp", 10 * step, config))
    sink.summary({})
    sink.close()
    events = read(tmp_path)
    assert [event.step for event in events.Images("figures/timeline")] == [10, 20, 40, 70]
    image = events.Images("figures/mesh")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > image.height > 100
