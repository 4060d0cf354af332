"""The comparison of tests/snapshot finds what changed, and only that."""

import json
from typing import Any

import pytest

from tests.snapshot import lines, messages, runs

SAID = (
    "1 problem, nothing was trained:\n"
    "  model.num_heads=6 is not divisible by strategy.tp=4: use strategy.tp=2, strategy.tp=1 nproc=1 or nproc=2\n"
)
REWORDED = "strategy.tp=4 does not divide model.num_heads=6. Use nproc=2, or strategy.tp=2, strategy.tp=1 nproc=1."


def test_lines_are_many_and_drawn_the_same_every_time():
    assert len(lines.bad_lines()) > 400 and lines.bad_lines() == lines.bad_lines()
    assert not set(lines.bad_lines()) & set(lines.valid_lines())


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        (SAID, ["strategy.tp=2", "nproc=1 strategy.tp=1", "nproc=2"]),
        ("it is foo: use model=tiny, or another of model=small|tiny", ["model=tiny"]),
        ("it is foo: use model=small|tiny", []),
        ("needs a path: use data.path=FILE", []),
        ("is no override: use group=option or key=value", []),
        ("adds up to 9: use strategy.layers_per_stage=[4,4] or model.num_layers=9",
         ["strategy.layers_per_stage=[4,4]", "model.num_layers=9"]),
    ],
)  # fmt: skip
def test_offers_are_found(text, offered):
    assert messages.offers(text) == offered


def test_an_offer_takes_the_place_of_what_was_given():
    assert messages.mended("local nproc=4 strategy=tp strategy.tp=3", "strategy.tp=2 nproc=2") == (
        "local strategy=tp strategy.tp=2 nproc=2"
    )


def answer(text, code=2, **offers):
    return {"local nproc=4": {"code": code, "text": text, "offers": offers or dict.fromkeys(messages.offers(text), 0)}}


def test_other_words_are_no_difference():
    for before, after in ((SAID, SAID), (SAID, REWORDED)):
        outcome = messages.compare(answer(before), answer(after))
        assert not outcome.differences
        assert (outcome.same_code, outcome.same_words, outcome.offers_kept, outcome.working) == (1, 1, 3, 3)


@pytest.mark.parametrize(
    ("after", "says"),
    [
        (answer(SAID, code=3), "exit code 2, then 3"),
        (answer(SAID.replace("model.num_heads", "heads")), "no longer names the key model.num_heads"),
        (answer(SAID.replace("tp=4", "tp")), "no longer names the value 4"),
        (answer(SAID.replace(" or nproc=2", "")), "no longer offers nproc=2"),
        (answer(SAID, **{"strategy.tp=2": 2, "nproc=1 strategy.tp=1": 0, "nproc=2": 0}), "which ends with exit code 2"),
        ({}, "is not in the second record"),
    ],
)
def test_what_is_lost_is_a_difference(after, says):
    (difference,) = messages.compare(answer(SAID), after).differences
    assert says in difference


def test_runs_differ_by_a_bit_and_not_by_time(tmp_path):
    summary = {"perf/step_ms": 3.0, "first_step_s": 1.0, "comm/tp/all_gather_calls": 4.0}
    values = {"time": 1.0, "train/loss": 5.5, "perf/step_ms": 3.0, "comm/tp/all_gather_ms": 1.0, "comm/tp/x_mib": 1.5}
    for name, loss, wall in (("before", 5.5, 1.0), ("after", 5.500000000000001, 2.0)):
        steps = {"1": values | {"train/loss": loss, "time": wall, "comm/tp/all_gather_ms": wall}}
        found: dict[str, Any] = {
            "words": ["nproc=2"],
            "files": ["a"],
            "steps": steps,
            "summary": summary | {"first_step_s": wall},
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "tp.json").write_text(json.dumps(found))
    assert runs.compare(tmp_path / "before", tmp_path / "before") == []
    (difference,) = runs.compare(tmp_path / "before", tmp_path / "after")
    assert difference == "tp: step 1: train/loss: 5.5, then 5.500000000000001"
    found["steps"]["1"] = values.copy()
    del found["steps"]["1"]["perf/step_ms"]
    (tmp_path / "after" / "tp.json").write_text(json.dumps(found))
    (difference,) = runs.compare(tmp_path / "before", tmp_path / "after")
    assert difference == "tp: step 1: perf/step_ms: 3.0, then nothing"
