"""What a person sees in a browser: that the five strategies and their figures are on the pages, not that pages load."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.board_runs import FIGURES, STEPS, config_of, values_of, write_run
from tests.browser import browser, page, tensorboard  # noqa: F401  (fixtures)
from tests.synthetic_runs import make_run
from train import board

COMPARE = Path(__file__).resolve().parent.parent / "scripts" / "compare.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
KILLED = "ds_zero1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """strategy -> the run's name; one of the runs is left as a kill leaves it."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {strategy: write_run(folder, strategy, complete=strategy != KILLED).name for strategy in FIGURES}


@pytest.fixture(scope="module")
def url(runs):
    with tensorboard(runs[0]) as address:
        yield address


def last(strategy, tag):
    return values_of(strategy, STEPS, config_of(strategy))[tag]


def result(strategy, tag):
    """As it must stand in the table: a median after warm-up, to five digits."""
    config = config_of(strategy)
    standing = board.Standing(config.metrics.warmup_steps)
    for step in range(1, STEPS + 1):
        results = standing.add(values_of(strategy, step, config))
    return results.get(tag)


def test_time_series_shows_every_strategy_under_one_tag(page, url, runs):  # noqa: F811
    page.goto(f"{url}#timeseries")
    page.locator("metrics-tag-filter input").fill("^perf/tokens_per_s$")
    # the one that the filter found stands above those of the groups
    card = page.locator("scalar-card").filter(has=page.locator('[title="perf/tokens_per_s"]')).first
    rows = card.locator("tb-data-table-content-row")
    for strategy, name in runs[1].items():
        shown = [cell.replace(",", "") for cell in rows.filter(has_text=name).inner_text().split()]
        value = float(shown[2])  # after the name and the smoothed value
        assert value == pytest.approx(last(strategy, "perf/tokens_per_s"), rel=1e-6)
    assert rows.count() == len(FIGURES)


def test_hparams_table_answers_which_is_fastest_which_fits_and_why(page, url, runs):  # noqa: F811
    page.goto(f"{url}#hparams")
    grid = page.locator("vaadin-grid-cell-content")
    grid.filter(has_text="tokens/s").first.wait_for()
    for name in runs[1].values():
        grid.filter(has_text=name).first.wait_for()
    cells = [text.strip() for text in grid.all_inner_texts()]
    shown = cells[cells.index("Trial ID") :]
    assert shown[2:12] == [*board.FIRST_COLUMNS, *list(board.RESULTS.values())[:5]]
    for strategy, (nproc, _, held, memory_gib, exposed, bubble) in FIGURES.items():
        row = cells[cells.index(runs[1][strategy]) :][:13]
        assert strategy in row
        assert f"{nproc:.4f}" in row
        expected = [result(strategy, "result/tokens_per_s"), memory_gib, held, exposed, bubble]
        for column, value in zip(board.RESULTS, expected, strict=False):
            assert (f"{value:#.5g}" if value is not None else "") in row, (strategy, column, row)


def test_custom_scalars_draw_every_strategy(page, url, runs):  # noqa: F811
    page.goto(f"{url}#custom_scalars&_smoothingWeight=0")
    charts = page.locator("tf-custom-scalar-multi-line-chart-card")
    charts.nth(len(board.CHARTS) - 1).wait_for()
    assert charts.count() == len(board.CHARTS)
    for title in board.CHARTS:
        page.get_by_text(title, exact=True).wait_for()
    chart = charts.first
    chart.get_by_text("Matches (5)").wait_for()
    for name in runs[1].values():
        entry = chart.get_by_text(re.compile(rf"perf/tokens_per_s\s*\({name}\)")).first
        entry.wait_for(state="attached")  # in a list that opens with a click
    ends = set()
    for line in chart.locator("path.line").all():
        points = [float(x) for x in re.findall(r"-?[\d.]+", line.get_attribute("d"))]
        if len(points) == 2 * STEPS:
            ends.add(round(points[-1], 2))
    # heights on the page are the values, scaled
    low, *_, high = values = sorted(last(strategy, "perf/tokens_per_s") for strategy in FIGURES)
    bottom, *_, top = heights = sorted(ends, reverse=True)
    assert [(y - bottom) / (top - bottom) for y in heights] == pytest.approx(
        [(value - low) / (high - low) for value in values], abs=0.01
    )


@pytest.mark.parametrize("name", ["timeline", "memory", "mesh"])
def test_images_are_there_for_every_strategy(name, page, url, runs):  # noqa: F811
    pytest.importorskip("matplotlib")
    page.goto(f"{url}#images&tagFilter=figures%2F{name}")
    loaders = page.locator("tf-image-loader").filter(has_text=f"figures/{name}")
    for run in runs[1].values():
        loader = loaders.filter(has_text=run).first
        image = loader.locator("img")
        image.wait_for()
        page.wait_for_function("image => image.complete && image.naturalWidth > 400", arg=image.element_handle())
        loader.get_by_text("8", exact=True).first.wait_for()  # its step


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_shows_every_strategy_in_its_table_and_pictures(page, tmp_path, width):  # noqa: F811
    strategies = ["single", "dp", "fsdp", "tp", "pp"]
    for i, strategy in enumerate(strategies):
        make_run(tmp_path / "runs", strategy, world=1 if strategy == "single" else 2, ms=100.0 + 10 * i)
    report = tmp_path / "report.html"
    command = [sys.executable, str(COMPARE), str(tmp_path / "runs"), "--html", str(report)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(report.as_uri())
    rows = page.locator("table").first.locator("tbody tr")
    assert sorted(row.split()[0] for row in rows.all_inner_texts()) == sorted(strategies)
    pictures = page.locator("svg")
    assert pictures.count() >= 5
    for strategy in strategies:
        assert pictures.filter(has_text=strategy).count() >= 2, strategy
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself scrolls sideways"
