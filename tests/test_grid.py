"""The parts of a sweep: the grid, the search for a micro batch, the identity of a run's work, the end of a log."""

import json

import pytest

from launch.start.torchrun import last_words
from launch.sweeping.grid import expand
from launch.sweeping.starting import best_micro_batch
from train.command.cli import configured
from train.config.plan import Plan
from train.config.problems import BadInput
from train.record.run_dir import work_hash, write_work


@pytest.mark.timeout(60)
def test_grid_follows_hydras_grammar():
    points = expand(["strategy=dp,tp", "model=tiny", "train.micro_batch_size=range(1,3)", "nproc=2,4"])
    assert len(points) == 8
    assert points[0].label == "dp train.micro_batch_size=1 nproc=2"
    assert points[0].overrides == ("strategy=dp", "model=tiny", "train.micro_batch_size=1")
    assert [point.nproc for point in points[:2]] == [2, 4]
    (one,) = expand(["strategy=pp", "strategy.layers_per_stage=[3,3,2]", "data.path='a,b'"])
    assert one.overrides == ("strategy=pp", "strategy.layers_per_stage=[3,3,2]", "data.path='a,b'")
    assert (one.label, one.nproc) == ("pp", 1)
    lists = expand(["strategy.layers_per_stage=[3,5],[4,4]"])
    assert [point.overrides[0] for point in lists] == [f"strategy.layers_per_stage={x}" for x in ("[3,5]", "[4,4]")]
    assert len(expand(["strategy=dp,dp"])) == 1
    for word in ("strategy=dp,", "train.steps=interval(1,2)", "strategy=glob(*)", "nproc=0,2", "nproc=two"):
        with pytest.raises(BadInput, match=word.split("=")[0]):
            expand([word])


@pytest.mark.timeout(60)
def test_search_for_the_best_micro_batch():
    tried: list[int] = []

    def machine(speeds):
        def speed(size):
            tried.append(size)
            return speeds.get(size)

        tried.clear()
        return speed

    fits = {1: 10.0, 2: 20.0, 4: 19.0, 8: 18.0}
    assert best_micro_batch(machine(fits), 1, None, until_slower=False) == 8
    assert tried == [1, 2, 4, 8, 16], "a GPU: until it no longer runs"
    assert best_micro_batch(machine(fits), 1, 4, until_slower=False) == 4
    assert best_micro_batch(machine(fits), 1, 64, until_slower=True) == 2
    assert tried == [1, 2, 4], "a CPU: until it is no longer faster"
    assert best_micro_batch(machine({2: 100.0, 4: 102.9}), 2, 64, until_slower=True) == 2
    assert best_micro_batch(machine({2: 100.0, 4: 103.1}), 2, 64, until_slower=True) == 4
    assert best_micro_batch(machine({}), 2, 64, until_slower=True) is None


@pytest.mark.timeout(120)
def test_work_is_what_decides_the_numbers(tmp_path):
    plan, text = Plan(configured([]), 1), tmp_path / "text"
    first = work_hash(plan.config, "a" * 64)
    same = (
        "train.micro_batch_size=1", "compile.enabled=true", "metrics.dir=x", "runtime.device=cpu",
        "train.activation_checkpointing=full", "train.eval_every=3", f"data.path={text}",
    )  # fmt: skip
    other = (
        "model.num_layers=2", "data.source=text", "data.validation_fraction=0.2", "optim.lr=0.5", "optim.name=sgd",
        "precision=float64", "train.seed=1", "train.seq_len=64", "train.global_batch_size=16", "train.steps=3",
        "train.eval_batches=1",
    )  # fmt: skip
    assert len(first) == 8
    assert {work_hash(plan.override(line).config, "a" * 64) for line in same} == {first}
    assert work_hash(configured(["strategy=pp"]), "a" * 64) == first
    hashes = {work_hash(plan.override(line).config, "a" * 64) for line in other} | {work_hash(plan.config, "b" * 64)}
    assert len(hashes - {first}) == len(other) + 1

    write_work(tmp_path, plan.config, "a" * 64, {"tp": 2}, world_size=2)
    written = json.loads((tmp_path / "work.json").read_text())
    assert written["work_hash"] == first
    assert (written["differs"], written["lossy"]) == ({}, None)
    assert (written["strategy"], written["degrees"], written["world_size"]) == ("tp", {"tp": 2}, 2)
    assert written["work"]["train"] == {
        "seed": 1234,
        "seq_len": 128,
        "global_batch_size": 8,
        "steps": 100,
        "clip_norm": 1.0,
        "eval_batches": 8,
    }


@pytest.mark.timeout(60)
def test_last_words_are_short(tmp_path):
    log = tmp_path / "log"
    log.write_text("step 1\n" * 50 + "the reason\n")
    assert last_words(log) == ["step 1"] * 7 + ["the reason"]
    log.write_text("a" * 300 + "\n\nthe reason\n")
    assert last_words(log) == ["a" * 200 + " ...", "the reason"]
    log.write_text("")
    assert last_words(log) == ["(no output)"]
