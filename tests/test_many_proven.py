"""What `tests/many_proven.py` draws and what it keeps: its run takes half an hour."""

from dataclasses import replace

import pytest
import torch

from scripts.verifying.report import Answer
from tests import many_proven
from tests.drawn import NATIVE, PRESETS
from tests.many_proven import chunked, judged
from tests.proven import PRECISIONS, SIZES, configs, row_of, with_deepspeed
from tests.proven_page import page
from tests.rows.base import configured
from train.command.validate import findings
from train.config.plan import Plan
from train.proof.collecting import ADAMW_LR
from train.proof.locating.finding import Finding, Guess, Kind
from train.proof.locating.update.adamw import FEW, LEAST_MOVE, error_of_piece
from train.ranks.state import Piece

NUMBER = 60  # three turns of the native presets, and DeepSpeed's


@pytest.fixture(scope="module")
def drawn():
    return configs(NUMBER)


@pytest.mark.slow
def test_what_is_drawn_is_valid_and_of_every_kind(drawn):
    assert len({*drawn}) == NUMBER
    assert {one.overrides[0] for one in drawn} == {f"strategy={name}" for name in PRESETS if name != "single"}
    assert {one.world_size for one in drawn} == {*SIZES}
    found = {(one.overrides[0], one.plan.config.precision.value) for one in drawn if not with_deepspeed(one)}
    assert found == {(f"strategy={name}", precision) for name in NATIVE if name != "single" for precision in PRECISIONS}
    for one in drawn:
        row = row_of(one)
        assert not any(findings(Plan(configured(row.overrides), row.size))), one
        assert not any(findings(Plan(configured(row.reference), 1))), one
        run = Plan(configured(row.overrides), row.size)
        assert (run.degrees, run.num_microbatches, run.config.strategy) == (
            one.plan.degrees, one.plan.num_microbatches, one.plan.config.strategy
        ), one  # fmt: skip


def test_the_same_is_drawn_again_and_more_is_appended(drawn):
    assert configs(20) == drawn[:20]
    assert configs(20, seed=1) != drawn[:20]


def test_a_world_has_configs_of_one_size_and_deepspeed_is_apart(drawn):
    chunks = chunked(drawn)
    assert sorted(map(str, drawn)) == sorted(str(one) for chunk in chunks for one in chunk)
    assert all(len({(one.world_size, with_deepspeed(one)) for one in chunk}) == 1 for chunk in chunks)
    assert all(len(chunk) <= many_proven.CHUNK for chunk in chunks)


def result(error, finding=None):
    verdicts = [["loss", "loss", 1e-12, 1e-9, ""], ["gradients", "head.weight", error, 1e-9, ""]]
    return {"verdicts": verdicts, "finding": finding, "seconds": 1.0, "locating_seconds": 0.5}


def test_every_alarm_is_counted_and_ends_with_code_1(drawn, tmp_path, monkeypatch):
    finding = Finding("head", "gradient", Guess(Kind.factor), (), 1.0, 1e-9)
    results = [result(1e-12), result(1e-3), result(1e-12, finding), {"error": "no\nmemory"}, {"unjudged": "no target"}]
    done = [judged(one, found, "c", "t") for one, found in zip(drawn, results, strict=False)]
    assert [one.answer for one in done] == [
        Answer.equals, Answer.differs, Answer.equals, Answer.not_run, Answer.unjudged
    ]  # fmt: skip
    assert done[1].column == "gradients head.weight" and done[1].share == pytest.approx(1e6)
    counted = many_proven.counts(done, NUMBER)
    assert f"5 of {NUMBER} configs" in counted and "localiser's false alarms: 1" in counted and "no target" in counted
    assert "2 of 5 were called wrong" in page(done) and finding.sentence() in page(done)

    monkeypatch.setattr(many_proven, "FILE", tmp_path / "lines.jsonl")
    monkeypatch.setattr(many_proven, "configs", lambda number: drawn[:number])
    monkeypatch.setattr(many_proven, "results_of", lambda chunk: {one: results[drawn.index(one)] for one in chunk})
    assert many_proven.main(["number=1"]) == 0
    assert many_proven.main(["number=3", "chunks=0"]) == 0
    for number in (2, 3, 4):
        assert many_proven.main([f"number={number}"]) == 1
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == 4, "what has a result is not run again"
    kept = [replace(one, commit="c", torch="t") for one in many_proven.read(drawn)]
    assert kept == done[:4]


def weights_apart(moves):
    right = torch.randn(len(moves), generator=torch.Generator().manual_seed(0))
    moved = right + ADAMW_LR * moves
    piece = Piece(name="norm.weight", kind="parameter", shape=(len(moves),), offset=(0,), tensor=moved)
    return error_of_piece(piece, {("norm.weight", "parameter"): right})


def test_a_few_weights_that_rounding_moves_the_other_way_are_right_and_a_wrong_rate_is_not():
    """Seen on right strategies: a single number of 48, and the last rank's empty part of six experts on four ranks."""
    flipped = torch.zeros(48)
    flipped[:FEW] = 2.0
    assert weights_apart(flipped) <= LEAST_MOVE
    assert weights_apart(torch.full((48,), 2.0).index_fill(0, torch.arange(FEW + 1, 48), 0.0)) > LEAST_MOVE
    assert weights_apart(torch.full((48,), 0.1)) > LEAST_MOVE
    assert weights_apart(torch.tensor([float("nan"), *[0.0] * 47])) == float("inf")
    assert weights_apart(torch.zeros(0)) == 0.0
