"""What scripts/compare.py says of launch.netlab's predictions and measurements: orders, crossings, limits, bytes."""

import dataclasses
import re

import pytest

from scripts import compare
from scripts.comparing.links import words
from scripts.comparing.links.page import report, save
from scripts.comparing.links.reading import Message, Results, Row, crossings, pairs
from scripts.comparing.links.show import is_netlab, show
from train.config.problems import BadInput

TIMES = {  # measured and predicted ms at 25, 100 and 400 Mbit/s: tp is slower than pp on slow links only
    "tp": ((800.0, 200.0, 50.0), (900.0, 180.0, 55.0)),
    "pp": ((100.0, 100.0, 100.0), (110.0, 110.0, 110.0)),
    "dp": ((104.0, 103.0, 51.0), (300.0, 100.0, 40.0)),
}


def results():
    rows = [
        Row(name, name, speed * 1e6, ("tp",) if name == "tp" else (), "done", guess, 2**20, ms, 1e6 / ms, ms, 2**21)
        for name, both in TIMES.items()
        for speed, ms, guess in zip((25, 100, 400), *both, strict=True)
    ]
    link = Message(25e6, "all_reduce", 2**22, 1.5e6, 1.4e6)
    return Results(tuple(rows), (link,), 3e9, "nodes=2", 2, 2, {"torch": "2.13"})


def test_pairs_that_are_far_apart_are_in_the_predicted_order_or_named():
    found = pairs(results())
    # within 10 %: dp and pp at 25 and 100 Mbit/s, dp and tp at 400
    assert (found.count, found.apart, found.right, found.wrong) == (9, 6, 6, ())
    swapped = dataclasses.replace(
        results(), rows=tuple(dataclasses.replace(row, predicted_ms=1e6 / row.predicted_ms) for row in results().rows)
    )
    found = pairs(swapped)
    assert (found.apart, found.right) == (6, 0) and "tp and pp at 25 Mbit/s" in found.wrong


def test_lines_cross_where_their_times_are_equal():
    found = {(one.first, one.second): one for one in crossings(results()) if not one.predicted}
    assert ("tp", "pp") in found
    assert found["tp", "pp"].speed == pytest.approx(200e6) and found["tp", "pp"].ms == pytest.approx(100.0)


def test_a_run_that_failed_has_no_time_and_is_in_no_pair():
    failed = [dataclasses.replace(row, measured_ms=None, status="failed") if row.label == "tp" else row
              for row in results().rows]  # fmt: skip
    some = dataclasses.replace(results(), rows=tuple(failed))
    assert pairs(some).count == 3
    assert sum("failed" in line for line in words.table(some)) == 3


def test_what_the_order_of_axes_changes_is_explained_by_the_bytes():
    rows = [
        Row("tp_pp order=tp.pp", "tp_pp", 1e8, ("pp",), "done", 50.0, 2**20, 50.0),
        Row("tp_pp order=pp.tp", "tp_pp", 1e8, ("tp",), "done", 150.0, 30 * 2**20, 200.0),
    ]
    (line,) = [line for line in words.summary(dataclasses.replace(results(), rows=tuple(rows))) if "order=" in line]
    assert "tp_pp order=tp.pp is 4.00 times as fast" in line
    assert "1.00 MiB a step (pp) and not 30.00 MiB a step (tp) cross hosts" in line


def test_tables_and_the_page(tmp_path):
    lines = words.table(results(), markdown=True)
    assert lines[1].startswith("|---|---|---|---:") and len(lines) == 2 + 9
    assert "93.3%" in words.messages(results())[1]
    page = report(results(), "python scripts/compare.py FOLDER")
    assert page.count("<svg") == 1 and not re.search(r"(?:src|href)=.?http", page)
    assert "9 pairs" in page and "tp and pp are equally fast at 200 Mbit/s (measured)" in page
    save(results(), tmp_path / "links.png")
    assert (tmp_path / "links.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_other_results_is_refused(tmp_path):
    args = compare.parser().parse_args([str(tmp_path)])
    assert not is_netlab(tmp_path)
    for text in ("{}", '{"cluster": {"nodes": "x"}}', "["):
        (tmp_path / "netlab.json").write_text(text)
        assert is_netlab(tmp_path)
        with pytest.raises(BadInput, match=r"netlab.json is not .*: run launch.netlab again"):
            show(tmp_path, args)
    with pytest.raises(BadInput, match="leave --csv and --json out"):
        show(tmp_path, compare.parser().parse_args([str(tmp_path), "--json"]))
