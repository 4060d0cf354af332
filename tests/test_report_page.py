"""report.html in a browser, on a desktop, on a phone and in dark mode: values must be visible, not only present."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import browser, page  # noqa: F401  (fixtures)
from tests.synthetic_runs import make_run

COMPARE = Path(__file__).resolve().parent.parent / "scripts" / "compare.py"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
STRATEGIES = ["single", "dp", "fsdp", "tp", "pp"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("report")
    for i, strategy in enumerate(STRATEGIES):
        world = 1 if strategy == "single" else 2
        off = 1e-7 * i
        make_run(folder / "runs", strategy, world=world, ms=100.0 + 50 * i, off=off, pipeline=strategy == "pp")
    command = [sys.executable, str(COMPARE), str(folder / "runs"), "--html", str(folder / "report.html")]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return (folder / "report.html").as_uri()


@pytest.fixture
def errors(page):  # noqa: F811
    """Errors of the page's scripts, including those of a script that the policy forbids."""
    found = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else None)
    yield
    assert not found


def column(page, title):  # noqa: F811
    table = page.locator("table.sortable")
    place = table.locator("thead th").all_inner_texts().index(title)
    return [row.locator("th, td").nth(place).inner_text() for row in table.locator("tbody tr").all()]


def test_the_head_and_the_verdict_are_in_sight(page, report, errors):  # noqa: F811
    page.goto(report)
    for text in (
        "tiny (2 layers of width 128)",
        "8 sequences of 128 tokens a step",
        "python_docs (3.5 M tokens)",
        "a cpu",
    ):
        box = page.locator("header dd", has_text=text).bounding_box()
        assert box["y"] + box["height"] < 1000, f"{text} is not on the first screen"
    page.get_by_text("All 5 runs train the same model").wait_for()


def test_a_heading_sorts_by_click_and_by_key(page, report, errors):  # noqa: F811
    page.goto(report)
    assert column(page, "strategy") == ["single", "dp", "fsdp", "tp", "pp"]
    heading = page.locator("table.sortable thead th", has_text="bubble")
    heading.click()
    page.wait_for_function("document.querySelector('th[aria-sort]') !== null")
    page.wait_for_timeout(100)
    assert column(page, "strategy")[0] == "pp", "the only one with a bubble is first, unknown ones last"
    speed = page.locator("table.sortable thead th", has_text=re.compile("^tokens/s$"))
    speed.focus()
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    shown = [float(cell.split()[0].replace(",", "")) for cell in column(page, "tokens/s")]
    assert shown == sorted(shown) or shown == sorted(shown, reverse=True)
    assert column(page, "strategy") in (STRATEGIES, STRATEGIES[::-1])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pointing_at_a_chart_says_the_values(scheme, page, report, errors):  # noqa: F811
    page.emulate_media(color_scheme=scheme)
    page.goto(report)
    chart = page.locator("#g0-loss .uplot").first
    over = chart.locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    page.wait_for_timeout(200)
    values = chart.locator(".u-legend .u-value").all_inner_texts()
    assert values[0] == "12.000" and len(values) == 1 + len(STRATEGIES)
    assert [float(value) for value in values[1:]] == pytest.approx([3.8] * len(STRATEGIES), abs=1e-3)
    assert all(value.is_visible() for value in chart.locator(".u-legend .u-value").all())
    colours = page.evaluate("[...document.querySelectorAll('#g0-loss .u-axis')].length")
    assert colours == 4, "two axes of each panel"
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert ink == ("rgb(232, 232, 228)" if scheme == "dark" else "rgb(28, 29, 31)")


def test_each_line_of_a_chart_has_its_points_inside_the_axes(page, report, errors):  # noqa: F811
    page.goto(report)
    assert page.locator("figure.interactive").count() == 3
    inside = page.evaluate(
        """[...document.querySelectorAll('figure.interactive')].map(figure => figure.chart).map(chart => {
          const within = (value, scale) => value >= scale.min && value <= scale.max;
          const [xs, ...lines] = chart.data;
          return lines.every(line => line.some(y => y != null) && line.every((y, j) => y == null ||
            (within(y, chart.scales.y) && within(xs[j], chart.scales.x))));
        })"""
    )
    assert inside == [True, True, True]


@pytest.mark.parametrize("width", [1280, 820, 390])
def test_no_page_scrolls_sideways_and_the_first_column_stays(width, page, report, errors):  # noqa: F811
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(report)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself scrolls sideways"
    scroll = page.locator(".scroll", has=page.locator("table.sortable"))
    scroll.evaluate("element => { element.scrollLeft = element.scrollWidth; }")
    left = scroll.bounding_box()["x"]
    for cell in page.locator("table.sortable tbody th").all():
        assert cell.bounding_box()["x"] == pytest.approx(left, abs=1.5), "it scrolled away with the others"
    wide = page.locator("figure.wide")
    assert wide.bounding_box()["width"] <= width
    for picture in page.locator("figure:not(.wide):not(.interactive) svg").all():
        assert picture.bounding_box()["width"] <= width


def test_columns_of_pictures_end_together(page, report, errors):  # noqa: F811
    page.goto(report)
    page.wait_for_timeout(300)
    ends = []
    for side in page.locator(".pictures > .column").all():
        last = side.locator("> :last-child")
        box = last.bounding_box()
        ends.append(box["y"] + box["height"])
        content = last.locator("> :visible").last.bounding_box()
        assert box["y"] + box["height"] - content["y"] - content["height"] < 250, "half of a page is empty"
    assert len(ends) == 2 and ends[0] == pytest.approx(ends[1], abs=2)


def test_the_page_is_whole_without_scripts(browser, report):  # noqa: F811
    context = browser.new_context(java_script_enabled=False)
    try:
        bare = context.new_page()
        bare.goto(report)
        assert bare.locator("figure.interactive svg:visible").count() == 3
        assert bare.locator("table.sortable tbody tr").count() == len(STRATEGIES)
    finally:
        context.close()


def test_a_bar_says_its_value_when_pointed_at(page, report, errors):  # noqa: F811
    page.goto(report)
    titles = page.locator("#g0-wire svg g > title").all_text_contents()
    assert "tp, tp: 3 MiB" in titles
    colours = page.locator("table.sortable .swatch rect").evaluate_all(
        "rects => rects.map(r => r.getAttribute('fill'))"
    )
    assert len(set(colours)) == len(STRATEGIES)
