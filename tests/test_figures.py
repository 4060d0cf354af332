"""The pictures of a sampled step in TensorBoard: what they show, in which colours, on which scale, and how often."""

from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.board_runs import config_of, sample_of
from train.config.plan import Plan


def test_figures_of_a_sampled_step(tmp_path):
    pytest.importorskip("matplotlib")
    from train.record.pictures import draw_sample

    config = config_of("3d")
    sample, degrees = sample_of("3d", 4, config), Plan(config, 8).degrees
    drawn = draw_sample(sample, degrees)
    assert list(drawn) == ["why_pictures/timeline", "why_pictures/memory", "why_pictures/mesh"]
    bars: Any = drawn["why_pictures/timeline"].axes[0].patches
    pieces_of_memory: Any = drawn["why_pictures/memory"].axes[0].patches
    pieces = sorted((start, end - start, row) for row, rank in enumerate(sample["ranks"])
                    for _, _, _, start, end in rank["timeline"])  # fmt: skip
    shown = sorted((bar.get_x(), bar.get_width(), round(bar.get_y() + 0.4)) for bar in bars)
    assert shown == [pytest.approx(piece) for piece in pieces]
    by_kind = [sum(bar.get_width() for bar in pieces_of_memory)]
    assert by_kind == pytest.approx([sum(sum(r["memory"]["at_peak_mib"].values()) for r in sample["ranks"])])
    labels = [text.get_text() for axes in drawn["why_pictures/mesh"].axes for text in axes.texts]
    assert [label.split("\n")[0] for label in labels] == [f"rank {rank}" for rank in range(8)]
    assert list(draw_sample(sample)) == ["why_pictures/timeline", "why_pictures/memory"]
    for rank in sample["ranks"]:
        rank["timeline"], rank["memory"] = [], {"at_peak_mib": {}, "curve": []}
    assert not draw_sample(sample), "nothing was measured, and yet drawn"


def test_one_thing_has_one_colour_and_pictures_one_scale():
    pytest.importorskip("matplotlib")
    from scripts.comparing.pages import pictures, timelines
    from train.measure.results import MEMORY_KINDS
    from train.record import palette
    from train.record import pictures as figures

    assert pictures.MEMORY_COLOURS is palette.MEMORY_COLOURS
    assert pictures.PART_COLOURS is palette.PART_COLOURS
    assert timelines.WORK is figures.WORK is palette.WORK
    for part, kind in (("forward", "F"), ("backward", "B")):
        assert palette.PART_COLOURS[part] == palette.WORK[kind][1]
    assert figures.MEMORY.keys() == set(MEMORY_KINDS)
    ends = {size: figures.scale_end(size) for size in (0.0, 0.3, 1.0, 1.01, 2.0, 247.0, 444.0, 545.0, 995.0, 1265.0)}
    assert ends == {0.0: 1.0, 0.3: pytest.approx(0.5), 1.0: 1.0, 1.01: 2.0, 2.0: 2.0, 247.0: 500.0, 444.0: 500.0,
                    545.0: 1000.0, 995.0: 1000.0, 1265.0: 2000.0}  # fmt: skip


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv_zero_bubble"])
def test_a_timeline_of_several_stages_on_a_rank(schedule):
    pytest.importorskip("matplotlib")
    from train.record.pictures import timeline
    from train.strategies.pipeline.timetable import UNITS, actions_by_rank
    from train.strategies.pipeline.timetable import timetable as at_times

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
    assert figure is not None
    assert len(figure.axes[0].patches) == sum(len(row) for row in table.rows)
    assert {bar.get_alpha() for bar in figure.axes[0].patches} == {0.55, 1.0}


def test_pictures_are_drawn_ever_more_rarely_and_of_the_last_sample(tmp_path):
    pytest.importorskip("matplotlib")
    from train.record.sinks import TensorBoard

    config = config_of("pp")
    sink = TensorBoard(tmp_path, {}, degrees=Plan(config, 4).degrees)
    for step in range(1, 8):
        sink.sample(10 * step, sample_of("pp", 10 * step, config))
    sink.summary({})
    sink.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert [event.step for event in events.Images("why_pictures/timeline")] == [10, 20, 40, 70]
    image = events.Images("why_pictures/mesh")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert image.width > image.height > 100
