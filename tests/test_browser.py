"""What a person sees in a browser: the pages show the five strategies and their figures."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.board_runs import FIGURES, STEPS, config_of, validation_loss, values_of, write_run
from tests.browser import browser, page, tensorboard  # noqa: F401  (fixtures)
from tests.synthetic_runs import make_run
from train.record import board

REPO = Path(__file__).resolve().parent.parent
COMPARE = REPO / "scripts" / "compare.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
KILLED = "ds_zero1"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """strategy -> the name of its run. One of the runs looks like a killed run."""
    folder = tmp_path_factory.mktemp("runs")
    return folder, {strategy: write_run(folder, strategy, complete=strategy != KILLED).name for strategy in FIGURES}


@pytest.fixture(scope="module")
def url(runs):
    with tensorboard(runs[0]) as address:
        yield address


def last(strategy, tag):
    """The last value of a tag in the run, or None."""
    config = config_of(strategy)
    if tag == "validation/loss":
        return 5.0 if strategy == KILLED else validation_loss(strategy)
    standing = board.ResultsSoFar(config.metrics.warmup_steps)
    for step in range(1, STEPS + 1):
        results = standing.add(values_of(strategy, step, config))
    return (results | values_of(strategy, STEPS, config)).get(tag)


def test_the_landing_page_has_what_explains_the_results_behind_them(page, url):  # noqa: F811
    page.goto(url)
    toolbars = page.locator("metrics-card-group-toolbar")
    toolbars.filter(has_text="why_pictures").wait_for()
    groups = [title.strip() for title in toolbars.locator(".group-title").all_inner_texts()]
    assert groups == ["memory", "perf", "result", "train", "validation", "why", "why_by_rank", "why_pictures"]


def test_the_link_of_the_docs_puts_results_on_top(page, url):  # noqa: F811
    (link,) = re.findall(
        r"^\[pinned\]: http://localhost:6006/(\S+)$", (REPO / "docs" / "measuring.md").read_text(), re.M
    )
    page.goto(url + link)
    pinned = page.locator("metrics-pinned-view")
    for tag in ("result/tokens_per_s", "train/loss", "validation/loss", "result/peak_tensors_mib"):
        pinned.locator(f'[title="{tag}"]').first.wait_for()
    assert pinned.locator("scalar-card").count() == 4


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
        assert str(nproc) in row
        assert not any(cell.endswith(".0000") for cell in row[2:7]), "a number of ranks or sequences with decimals"
        expected = [last(strategy, "result/tokens_per_s"), memory_gib, held, exposed, bubble]
        for column, value in zip(board.RESULTS, expected, strict=False):
            assert (f"{value:#.5g}" if value is not None else "") in row, (strategy, column, row)


def test_compare_shows_the_last_value_of_every_strategy_inside_the_axis(page, url):  # noqa: F811
    page.set_viewport_size({"width": 1500, "height": 4000})  # a chart is drawn when it comes into view
    page.goto(f"{url}#custom_scalars")
    charts = page.locator("tf-custom-scalar-margin-chart-card")
    charts.nth(len(board.CHARTS) - 1).wait_for()
    assert charts.evaluate_all("cards => cards.map(card => card.title)") == list(board.CHARTS)
    page.get_by_text(next(iter(board.CHARTS)), exact=True).wait_for()
    assert page.get_by_text("Missing Tags").count() == 0
    for number, tags in enumerate(board.CHARTS.values()):
        chart, had = charts.nth(number), [v for s in FIGURES if (v := last(s, tags[0])) is not None]
        chart.get_by_text(f"Matches ({len(had)})").wait_for()
        page.wait_for_timeout(500)  # lines move to their place
        ends, height = set(), 0.0
        for line in chart.locator("path.line").all():  # two of each run, one over the other
            path, height = line.evaluate("x => [x.getAttribute('d'), x.closest('.component').clientHeight]")
            if points := [float(x) for x in re.findall(r"-?[\d.]+", path or "")]:
                ends.add(points[-1])
        values, heights = sorted(set(had)), sorted(ends, reverse=True)
        assert len(heights) == len(values), (tags, heights, values)
        assert all(0 <= y <= height for y in heights), (tags, heights, height)
        # heights on the page are the values, scaled
        low, high, bottom, top = values[0], values[-1], heights[0], heights[-1]
        if high > low:
            assert [(y - bottom) / (top - bottom) for y in heights] == pytest.approx(
                [(value - low) / (high - low) for value in values], abs=0.02
            ), tags


@pytest.mark.parametrize("name", ["timeline", "memory", "mesh"])
def test_images_are_there_for_every_strategy(name, page, url, runs):  # noqa: F811
    pytest.importorskip("matplotlib")
    page.goto(f"{url}#images&tagFilter=why_pictures%2F{name}")
    loaders = page.locator("tf-image-loader").filter(has_text=f"why_pictures/{name}")
    for strategy, run in runs[1].items():
        loader = loaders.filter(has_text=run).first
        image = loader.locator("img")
        image.wait_for()
        page.wait_for_function("image => image.complete && image.naturalWidth", arg=image.element_handle())
        # a pixel for a pixel: TensorBoard leaves pixels out of larger ones, and letters lose strokes
        assert image.evaluate("image => [image.naturalWidth, image.clientWidth]") == [350, 350]
        step = "8" if strategy == KILLED else "12"  # the third sample is drawn when the run ends
        loader.get_by_text(step, exact=True).first.wait_for()


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
