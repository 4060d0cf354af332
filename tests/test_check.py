"""launch.plan check=N: which layouts are run, and what is said of them."""

from types import SimpleNamespace
from typing import Any

import pytest

from launch.planning import check as checking
from tests.plans import plan_of
from tests.synthetic_runs import make_run
from train.command.planning.step_time import StepTime
from train.config.problems import BadInput


def answer(tmp_path, *products: str) -> Any:
    """Layouts, the fastest first, each priced in one precision."""
    best = [
        SimpleNamespace(
            quantities=SimpleNamespace(job=SimpleNamespace(products=name)),
            layout=SimpleNamespace(name="tp", words=("strategy=tp",)),
            time=StepTime(0.1, {}, 0.0, 0.01, 0.0, 1024, 2),
            seconds=0.11 + i,
        )
        for i, name in enumerate(products)
    ]
    base = plan_of(f"strategy=tp nproc=2 precision=float32 metrics.dir={tmp_path}")
    return SimpleNamespace(base=base, best=best, typed=("precision=float32", "train.steps=7"))


def test_the_first_the_middle_and_the_last_are_run():
    assert checking.picked(10, 3) == [0, 1, 2, 5, 9]
    assert checking.picked(2, 5) == [0, 1]
    assert checking.picked(1, 1) == [0]


def test_layouts_are_proven_then_run_and_shown_beside_their_prediction(tmp_path, monkeypatch):
    ran = []

    def run(tool, words, folder, log):
        ran.append((tool[-1], words))
        if log == "sweep.log":
            make_run(folder, "tp")  # ordinary steps take 106 to 112 ms

    monkeypatch.setattr(checking, "_run", run)
    monkeypatch.setattr(checking, "shown", lambda layout: "tp 2")
    lines = [*checking.check(answer(tmp_path, "fp8", "float32", "float32"), 1)]
    assert [tool.rpartition("/")[-1] for tool, _ in ran] == ["verify.py", "launch.sweep"] * 2
    assert all({"nproc=2", "precision=float32", "strategy=tp"} <= {*words} for _, words in ran)
    assert "train.steps=40" in ran[1][1] and not any("train.steps=7" in words for _, words in ran)
    assert lines[0] == "layout 2: tp, tp 2", "the first one is priced in a precision in which the lab does not train"
    assert any("proven equal to one device" in line for line in lines)
    assert lines[-1].startswith("the fastest is layout 2;")


def test_what_cannot_be_checked_is_one_message(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="no layout was priced in it: add precision=float32"):
        [*checking.check(answer(tmp_path, "fp8"), 1)]
    monkeypatch.setattr(checking, "shown", lambda layout: "")
    monkeypatch.setattr(checking, "_run", lambda *of_run: None)
    with pytest.raises(checking.NotChecked, match="has no finished run"):
        [*checking.check(answer(tmp_path, "float32"), 1)]
