"""`scripts/verify.py`: the sizes that it chooses, and what it says of those that it does not."""

import pytest

from scripts import verify
from scripts.verifying import task
from scripts.verifying.exercise import left_out
from scripts.verifying.sizes import uneven
from train.command import cli
from train.command.presets import names
from train.command.validate import findings
from train.config.plan import Plan
from train.config.problems import BadInput
from train.data import sources

FULL = {"precision": "float64", "train.seq_len": "16", "model.vocab_size": "257", "data.ignore_token": "32"}


def read(line):
    return verify.read([*line.split(), "runtime.device=cpu"])


def chosen(line):
    """What is chosen for a single strategy."""
    (subject,) = read(line).subjects.values()
    return subject.chosen


@pytest.mark.parametrize(
    ("line", "differs"),
    [
        ("strategy=dp nproc=2", {"rows": "12", "layers": "2"}),  # 3 microbatches, as the degree is 2
        ("strategy=dp nproc=3", {"rows": "12", "layers": "2"}),  # 2 of them, as the degree is 3
        ("strategy=tp_pp nproc=4", {"rows": "6", "layers": "2"}),
        ("strategy=pp nproc=4", {"rows": "10", "layers": "4"}),  # 1F1B needs as many microbatches as stages
        ("strategy=pp nproc=2 strategy.schedule=dualpipev", {"rows": "10", "layers": "4"}),
        ("strategy=cp nproc=16", {"rows": "4", "layers": "2", "train.seq_len": "32"}),
        ("strategy=ep nproc=4", {"rows": "16", "layers": "2", "model": "moe_tiny"}),
        ("strategy=ds_zero3 nproc=2", {"rows": "12", "layers": "2", "precision": None}),
    ],
)
def test_the_smallest_sizes_that_exercise_the_strategy_are_chosen(line, differs):
    expected = {"model.num_layers": differs.pop("layers"), "train.global_batch_size": differs.pop("rows")}
    words = FULL | {"train.micro_batch_size": "2"} | expected | differs
    assert chosen(line) == {key: value for key, value in words.items() if value is not None}


@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ("precision=float32", "precision"),
        ("model=tiny", "model.num_layers"),
        ("model=tiny", "model.vocab_size"),
        ("train.micro_batch_size=1", "train.micro_batch_size"),
        ("train.global_batch_size=8", "train.global_batch_size"),
        ("data.ignore_token=null", "data.ignore_token"),
        ("data=synthetic", "data.ignore_token"),
        ("model.max_seq_len=8", "train.seq_len"),  # not typed, but 16 is too long, and so is the default
    ],
)
def test_what_is_typed_is_never_changed(typed, key):
    words = ["strategy=fsdp", typed]
    if key == "train.seq_len":
        with pytest.raises(BadInput, match=r"train.seq_len=128 is more than model.max_seq_len=8"):
            read(f"nproc=2 {' '.join(words)}")
        return
    (subject,) = read(f"nproc=2 {' '.join(words)}").subjects.values()
    assert key not in subject.chosen
    typed_alone = cli.configured(words)
    group, _, name = key.rpartition(".")
    for config in (subject.config, subject.reference):
        expected, found = ((getattr(one, group) if group else one) for one in (typed_alone, config))
        assert getattr(found, name) == getattr(expected, name)
    assert not any(findings(Plan(subject.config, 2)))


def test_a_typed_global_batch_is_split_into_the_best_microbatches():
    assert chosen("strategy=dp nproc=2 train.global_batch_size=12")["train.micro_batch_size"] == "2"
    assert chosen("strategy=dp nproc=2 train.global_batch_size=6")["train.micro_batch_size"] == "1"
    assert chosen("strategy=dp nproc=2 train.global_batch_size=8")["train.micro_batch_size"] == "2"  # several rows


def test_a_value_that_breaks_a_rule_keeps_its_default():
    words = chosen("strategy=pp nproc=2 strategy.layers_per_stage=[3,5]")
    assert "model.num_layers" not in words and words["precision"] == "float64"


def test_microbatches_have_unequal_numbers_of_targets():
    (subject,) = read("strategy=dp nproc=2").subjects.values()
    source = sources.read(subject.config)
    assert uneven(Plan(subject.config, 2), source)
    assert not uneven(Plan(subject.config, 2).override("data.ignore_token=null"), source)


@pytest.mark.slow
def test_all_is_every_preset_that_the_number_of_processes_allows():
    every = read("strategy=all nproc=4")
    assert every.left_out == {
        "single": "can run on 1 process",
        "4d": "can run on 8 processes",
        "moe_3d": "can run on 8 processes",
    }
    assert len(every.subjects) == len(names("strategy")) - 3
    for name, subject in every.subjects.items():
        plan = Plan(subject.config, 4)
        assert not any(findings(plan)) and plan.num_microbatches >= 2, name
        idle = [f"{axis} (strategy.{axis}=1)" for axis in plan.axes if plan.degrees[axis] == 1]
        assert left_out(plan, {"masked": True}) == idle


def test_all_reports_a_word_that_no_preset_takes(monkeypatch):
    monkeypatch.setattr(task, "names", lambda group: ["dp", "tp"])
    with pytest.raises(BadInput, match=r"train\.stps"):
        read("strategy=all nproc=2 train.stps=3")


@pytest.mark.parametrize(
    ("line", "facts", "expected"),
    [
        ("strategy=tp_pp nproc=4", {"masked": True, "clipped": True}, []),
        ("strategy=dp nproc=2 train.micro_batch_size=4 train.global_batch_size=8", {}, ["accumulation"]),
        ("strategy=dp nproc=2 train.micro_batch_size=1", {}, ["several rows"]),
        ("strategy=dp nproc=2", {"masked": False}, ["masks"]),
        ("strategy=dp nproc=2 data.ignore_token=null", {}, ["masks"]),
        ("strategy=tp nproc=2 model.vocab_size=256", {}, ["padding (strategy.tp=2 divides"]),
        ("strategy=fsdp_tp nproc=2", {}, ["dp_shard (strategy.dp_shard=1)"]),
        ("strategy=ep nproc=2 strategy.ep=1", {}, ["ep (strategy.ep=1)"]),
        ("strategy=dp nproc=2", {"clipped": False}, ["clipping"]),
        ("strategy=dp nproc=2 strategy.comm_hook=powersgd", {}, ["strategy.comm_hook=powersgd (it starts after"]),
    ],
)
def test_what_the_sizes_do_not_try_is_named(line, facts, expected):
    (subject,) = read(line).subjects.values()
    nproc = int(line.partition("nproc=")[2].split()[0])
    named = left_out(Plan(subject.config, nproc), facts)
    assert len(named) == len(expected) and all(map(str.startswith, named, expected)), named
