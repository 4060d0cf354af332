"""Every strategy equals one device: loss, every gradient, norm, SGD weights, AdamW loss (train/proof/comparison.py)."""

import dataclasses
from typing import Any

import pytest

from scripts.verifying.report import share_of_bound
from tests.rows import QUICK_ROWS, ROWS, SLOW_ROWS, Row
from tests.running import run_rows
from train.proof.comparison import Verdict

MUST_BE_RED = {"gradients", "sgd_weights"}
ACTS_ONLY_IN = {  # bugs that training, or that rank 0, does not show
    "judged_on_the_first_labels": {"evaluate"},
    "own_tokens_times_ranks": {"evaluate"},
    "norms_rounded_on_every_rank": {"replicas"},
}


@pytest.fixture(scope="session")
def table(request, tmp_path_factory):
    """Results of the selected rows of a size. The world of that size runs when its first row needs it."""
    done: dict[tuple[int, bool], dict[str, Any]] = {}
    selected = {
        item.callspec.params["row"] for item in request.session.items if "row" in getattr(item, "fixturenames", ())
    }

    def results(row, rows):
        key = (row.size, rows is SLOW_ROWS)
        if key not in done:
            folder = tmp_path_factory.mktemp(f"world_{row.size}")
            done[key] = {}  # of a world that is cut off by this row's clock: it does not start again for the next
            done[key] = run_rows(folder, [other for other in rows if other.size == row.size and other in selected])
        return done[key].get(row.name, {"error": f"the world of {row.size} was cut off in an earlier row"})

    return results


def verdicts(result):
    assert "error" not in result, result["error"]
    return [Verdict(*values) for values in result["verdicts"]]


def names(row: Row) -> str:
    return row.name


def params(rows: list[Row]) -> list[Any]:
    return [pytest.param(row, marks=[] if row in QUICK_ROWS else [pytest.mark.slow]) for row in rows]


def assert_green(result):
    for v in verdicts(result):
        assert v.ok, f"{v.column}: {v.name} differs by {v.error:.1e}, bound {v.bound:.0e}"


def assert_red(row, result, record_property):
    red = {v.column: share_of_bound(v) for v in verdicts(result) if not v.ok}
    margins = ", ".join(f"{column} {margin:.0e}" for column, margin in red.items())
    record_property("planted_bug", f"{row.bug}: error / bound: {margins}")
    assert result["patched_calls"] > 0, "the patched line never ran"
    only = ACTS_ONLY_IN.get(row.bug)
    assert (red.keys() == only) if only else (MUST_BE_RED & red.keys()), f"only {red} is red"


# a world runs all its rows under its first row's clock
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("row", params([row for row in ROWS if not row.bug]), ids=names)
def test_strategy_equals_one_device(row, table):
    assert_green(table(row, ROWS))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("row", params([row for row in ROWS if row.bug]), ids=names)
def test_planted_bug_turns_the_row_red(row, table, record_property):
    assert_red(row, table(row, ROWS), record_property)


@pytest.mark.parametrize("row", [row for row in ROWS if row.bug], ids=names)
def test_planted_bug_is_in_an_ordinary_row(row):
    """A row with a planted bug must fail. The same row without the bug is in the table, with the same bound."""
    assert dataclasses.replace(row, bug=None) in ROWS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("row", SLOW_ROWS, ids=names)
def test_product_or_option_equals_one_device(row, table):
    assert_green(table(row, SLOW_ROWS))
