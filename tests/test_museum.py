"""The museum: every exhibit is complete, valid and on its page. `python -m tests.museum` runs all of them."""

import pytest

from tests import museum, planted
from tests.museum.base import KINDS, PARTS
from tests.museum.exhibits import EXHIBITS
from tests.museum.exhibits.chapters import CHAPTERS
from tests.museum.running import ROOT, outcome
from tests.museum.writing import page
from tests.rows.base import configured
from tests.running import run_rows
from train.command.validate import validate
from train.model.transformer import Transformer, dtypes

PLANTED = planted.BUGS | museum.BUGS
FEW = ("norm_of_own_stage", "loss_normalised_for_the_log_only", "everything_decays", "ring_backward_with_own_keys")


def bug(exhibit):
    return exhibit.bug


def test_no_two_plants_have_the_same_name():
    assert not planted.BUGS.keys() & museum.BUGS.keys()
    assert len(museum.BUGS) >= 25


def test_every_plant_of_the_museum_is_shown_once():
    shown = [exhibit.bug for exhibit in EXHIBITS]
    assert len(shown) == len(set(shown))
    assert museum.BUGS.keys() <= set(shown) <= PLANTED.keys()


@pytest.mark.parametrize("exhibit", EXHIBITS, ids=bug)
def test_an_exhibit_is_valid(exhibit):
    row = exhibit.row
    assert row.bug == exhibit.bug and PLANTED[exhibit.bug].__doc__
    config = configured(row.overrides)
    assert not validate(config, row.size)
    assert not validate(configured(row.reference), 1)
    assert exhibit.kind in KINDS and exhibit.kind in CHAPTERS
    assert exhibit.axis in ("", "ep", *config.strategy.mesh_axes())
    modules = dict(Transformer(config.model, **dtypes(config.precision)).named_modules())
    assert exhibit.module in PARTS or exhibit.module in modules


def test_sources_are_unique_and_their_addresses_are_those_of_their_numbers():
    sources = [exhibit.source for exhibit in EXHIBITS if exhibit.source]
    assert len({(source.project, source.number) for source in sources}) == len(sources)
    for source in sources:
        assert source.url.startswith("https://github.com/")
        assert source.url.endswith(f"/{source.number.partition(',')[0]}"), source
        assert source.url.split("/")[4] == source.project.split("/")[1], source
        assert source.what.endswith(".") and source.lived


def test_the_page_was_written_from_the_exhibits():
    text = (ROOT / "docs" / "museum.md").read_text()
    missing = [exhibit.bug for exhibit in EXHIBITS if f"`{exhibit.bug}`" not in text]
    missing += [exhibit.source.url for exhibit in EXHIBITS if exhibit.source and exhibit.source.url not in text]
    assert not missing, "python -m tests.museum && python -m tests.museum --write"


def line(**found):
    return {"exhibit": "", "commit": "c", "torch": "t"} | found


def test_a_bug_that_never_ran_is_not_caught():
    red = ["gradients", "head.weight", 1.0, 1e-9, ""]
    assert outcome(EXHIBITS[0], line(verdicts=[red], patched_calls=1)).caught
    assert not outcome(EXHIBITS[0], line(verdicts=[red], patched_calls=0)).caught
    assert not outcome(
        EXHIBITS[0], line(verdicts=[["gradients", "head.weight", 0.0, 1e-9, ""]], patched_calls=1)
    ).caught


def test_a_finding_is_compared_with_what_is_expected():
    exhibit = EXHIBITS[0]
    right = {"module": exhibit.module, "axis": exhibit.axis, "kind": exhibit.kind, "sentence": "", "seconds": 1.0}
    found = outcome(exhibit, line(finding=right))
    assert found.place_found and found.kind_found
    assert outcome(exhibit, line(finding=right | {"module": f"{exhibit.module}:x"})).place_found
    assert not outcome(exhibit, line(finding=right | {"axis": "pp"})).place_found
    assert not outcome(exhibit, line(finding=right | {"kind": "rounding"})).kind_found
    assert not outcome(exhibit, line()).place_found
    assert "1 localised" not in page(EXHIBITS, {exhibit.bug: outcome(exhibit, line())})
    assert "1 of" in page(EXHIBITS, {exhibit.bug: found})


@pytest.mark.slow
def test_a_few_exhibits_are_caught(tmp_path):
    chosen = [exhibit for exhibit in EXHIBITS if exhibit.bug in FEW]
    results = run_rows(tmp_path / "rows", [exhibit.row for exhibit in chosen])
    for exhibit in chosen:
        assert outcome(exhibit, line() | results[exhibit.row.name]).caught, exhibit.bug
