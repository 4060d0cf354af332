"""A key that a run does not read is refused with a fix, and comparisons ignore it."""

import dataclasses
import json

import pytest
import torch

from launch import sweep
from launch.sweeping.starting import PROBE
from scripts.comparing import configs
from scripts.comparing.finding import Search
from scripts.comparing.gate import groups_of, unequal
from tests.synthetic_runs import MODEL, WORK, make_run
from train.command import cli, presets
from train.command.validate import validate
from train.config.plan import Plan
from train.config.problems import BadInput
from train.config.rules.idle import unread
from train.config.rules.read_when import DECIDES_NUMBERS_WHEN, READ_WHEN
from train.config.schema import Config
from train.measure.out_of_memory import explained
from train.record.run_folder import hash_of

# line -> the keys that are refused, and the first fix that is offered
REFUSED = {
    "optim.momentum=0.9": ("optim.momentum", "optim.momentum=0.0"),
    "optim=sgd optim.beta1=0.8": ("optim.beta1", "optim.beta1=0.9"),
    "optim=sgd optim.beta2=0.8 optim.eps=1e-6": ("optim.beta2 optim.eps", "optim.beta2=0.95 optim.eps=1.0e-08"),
    "optim.schedule=constant optim.min_lr_ratio=0.5": ("optim.min_lr_ratio", "optim.schedule=cosine"),
    "model.top_k=1": ("model.top_k", "model.top_k=2"),
    "model.num_shared_experts=1": ("model.num_shared_experts", "model.num_shared_experts=0"),
    "model.expert_ffn_dim=64": ("model.expert_ffn_dim", "model.expert_ffn_dim=0"),
    "model.score_function=softmax": ("model.score_function", "model.score_function=sigmoid"),
    "model.balance=aux_loss model.aux_loss_coef=0.1": (
        "model.balance model.aux_loss_coef",
        "model.balance=none model.aux_loss_coef=0.01",
    ),
    "model=moe_tiny model.num_experts=0 model.top_k=4": ("model.top_k", "model.top_k=2"),
    "model=moe_tiny model.aux_loss_coef=0.1": ("model.aux_loss_coef", "model.balance=aux_loss"),
    "model=moe_tiny model.balance=none model.bias_update_rate=0.1": ("model.bias_update_rate", "model.balance=bias"),
    "model=moe_tiny model.ffn_dim=64": ("model.ffn_dim", "model.ffn_dim=352"),
    "train.fp8_scaling=rowwise": ("train.fp8_scaling", "precision=fp8"),
    "metrics.trace=true metrics.profile_every=0": ("metrics.trace", "metrics.profile_every=500"),
    "metrics.memory_snapshot=true runtime.device=cpu": ("metrics.memory_snapshot", "runtime.device=auto"),
    "train.keep_zeros=true": ("train.keep_zeros", "train.keep_zeros=false"),
    "train.distil_weight=0.3 train.distil_temperature=2": (
        "train.distil_weight train.distil_temperature",
        "train.distil_weight=0.5 train.distil_temperature=1.0",
    ),
    "hardware.match=H300": ("hardware.match", "hardware.match=null"),
    "strategy=ds_zero1 strategy.whole_below=1000": ("strategy.whole_below", "strategy.whole_below=0"),
    "strategy=zero2 strategy.reshard_after_forward=false": ("strategy.reshard_after_forward", "strategy.zero_stage=3"),
    "data.dtype=uint16": ("data.dtype", "data.source=tokens"),
    "optim.momentum=0.9 train.fp8_scaling=rowwise": (
        "optim.momentum train.fp8_scaling",
        "optim.momentum=0.0 train.fp8_scaling=tensorwise",
    ),
}  # fmt: skip
VALID = [
    "optim=sgd optim.momentum=0.9",
    "optim.momentum=0",  # at its default
    "optim=sgd optim.beta1=0.9",
    "model=moe_tiny model.num_experts=0",  # the rest is as the preset has it
    "model=moe_tiny model.num_experts=0 model.num_shared_experts=0 model.balance=none",
    "model.num_experts=4 model.expert_ffn_dim=64 model.top_k=1",  # model.ffn_dim is as the preset has it
    "model=moe_tiny model.name=mine",
    "hardware=h100_sxm hardware.name=mine",
    "hardware=h100_sxm hardware.link_gb_per_s=900 hardware.memory_gb_per_s=900",  # they are recorded
    "optim.schedule=constant",
    "optim.schedule=linear optim.min_lr_ratio=0.5 train.steps=2 train.eval_every=50",  # a short trial of a longer run
    "precision=fp8 train.fp8_scaling=rowwise",
    "metrics.trace=true train.steps=2",  # the last step is recorded
    "metrics.memory_snapshot=true",
    "checkpoint.weights=x train.keep_zeros=true train.teacher=y train.distil_weight=0.3",
    "checkpoint.resume=x train.keep_zeros=true",
    "optim=adamw8bit optim.beta1=0.8",
    "data=jsonl data.source=text data.path=x",
]
HYDRA = {
    "hydra.run.dir=out": "metrics.dir=FOLDER",
    "+hydra.job.name=x": "metrics.dir=FOLDER",
    "hydra.verbose=true": "leave it out",
    "hydra=x": "leave it out",
    "~hydra": "leave it out",
    "hydra/launcher=joblib": "python -m launch.sweep",
    "hydra.sweep.dir=out": "python -m launch.sweep",
}


def parse(line: str) -> Config:
    return cli.configured(["strategy=single", *line.split()])


@pytest.mark.parametrize("line", REFUSED)
def test_a_key_that_is_not_read_is_refused_and_the_fix_is_valid(line):
    keys, fix = REFUSED[line]
    problems = validate(parse(line), 1)
    assert sorted(problem.message.partition("=")[0] for problem in problems) == sorted(keys.split())
    for problem in problems:
        assert problem.exit_code == 2
        assert sorted(problem.overrides) == sorted(fix.split())
        for words in problem.fix.removeprefix("use ").replace(" or ", ", ").split(", "):
            assert not validate(parse(f"{line} {words}"), 1), words


@pytest.mark.parametrize("line", VALID)
def test_a_key_that_is_read_or_that_nobody_chose_is_not_refused(line):
    assert validate(parse(line), 1) == []


@pytest.mark.parametrize("group", ["model", "data", "optim", "hardware"])
def test_every_preset_is_valid(group):
    for name in presets.names(group):
        assert validate(parse(f"{group}={name}"), 1) == [], name


def test_every_key_of_the_tables_is_one_of_the_config():
    config = parse("")
    for key in (*READ_WHEN, *DECIDES_NUMBERS_WHEN):
        group, name = key.split(".")
        assert hasattr(getattr(config, group), name), key


def test_without_its_presets_a_config_has_the_defaults_of_its_fields():
    composed = parse("model=moe_tiny model.num_experts=0")
    plain = Config(**{field.name: getattr(composed, field.name) for field in dataclasses.fields(Config)})
    refused = {problem.message.partition("=")[0] for problem in validate(plain, 1)}
    assert refused == {"model.num_shared_experts", "model.expert_ffn_dim", "model.balance"}
    assert validate(Plan(composed, 1).override("train.steps=5").config, 1) == []


@pytest.mark.parametrize("word", HYDRA)
def test_what_hydra_would_do_is_refused(word):
    with pytest.raises(BadInput) as caught:
        parse(word)
    (problem,) = caught.value.problems
    assert (caught.value.exit_code, problem.message.partition(" ")[0]) == (2, word)
    assert HYDRA[word] in problem.fix


def test_a_peak_of_no_precision_is_refused():
    (problem,) = validate(parse("+hardware.peak_tflops.fp16=312"), 1)
    assert "hardware.peak_tflops.fp16=312" in problem.message and "bf16" in problem.fix
    assert validate(parse("hardware=h100_sxm precision=float64"), 1) == [], "a device has peaks of other precisions too"


def test_a_snapshot_of_a_device_that_has_none_is_refused():
    with (
        pytest.raises(BadInput, match=r"metrics\.memory_snapshot=true needs a CUDA device, but the run is on cpu") as e,
        explained(parse("metrics.memory_snapshot=true"), torch.device("cpu"), 0),
    ):
        pass
    assert e.value.exit_code == 3


@pytest.mark.timeout(60)
def test_a_sweep_says_which_points_do_not_read_a_key_and_runs_the_rest(tmp_path, monkeypatch, capsys):
    started = []

    def start(overrides, nproc, log, told):
        started.append(list(overrides))
        told.write_text("run\n")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"perf/tokens_per_s": 1.0}))
        log.touch()
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("launch.sweep.path_of", lambda script: "compare.py")  # there is none: the sweep ends here
    words = ["strategy=dp", "optim=adamw,sgd", "optim.momentum=0.9"]
    with pytest.raises(SystemExit) as end:
        sweep.main(words, start)
    said = capsys.readouterr().err
    assert end.value.code == 2 and not started
    assert "1 of 2 point(s)" in said and "optim=adamw\n    optim.momentum=0.9 is not read by optim=adamw" in said
    assert sweep.main([*words, "skip_invalid=true"], start) == 0
    assert [words[1] for words in started] == ["optim=sgd"]


def test_a_probe_of_a_sweep_is_valid_where_its_point_is():
    point = ["strategy=single", "metrics.trace=true", "optim.schedule=linear", "optim.min_lr_ratio=0.5"]
    assert validate(cli.configured([*point, *PROBE]), 1) == []


@pytest.mark.parametrize(
    ("group", "one", "other"),
    [
        ("optim", {"name": "adamw", "momentum": 0.9}, {"name": "adamw"}),
        ("optim", {"name": "sgd", "beta1": 0.8}, {"name": "sgd", "beta1": 0.9}),
        ("optim", {"schedule": "constant", "min_lr_ratio": 0.5}, {"schedule": "constant"}),
        ("optim", {"name": "sgd", "schedule": "linear", "warmup_steps": 12}, {"name": "sgd", "warmup_steps": 12}),
        ("model", MODEL | {"num_experts": 0, "top_k": 4, "balance": "bias"}, MODEL | {"num_experts": 0}),
        ("model", MODEL | {"num_experts": 4, "ffn_dim": 5}, MODEL | {"num_experts": 4}),
        ("model", MODEL | {"num_experts": 4, "aux_loss_coef": 5.0}, MODEL | {"num_experts": 4}),
        ("model", MODEL | {"name": "mine", "max_seq_len": 512}, MODEL),
    ],
)  # fmt: skip
def test_work_is_the_same_where_a_key_did_nothing(group, one, other):
    first, second = (WORK | {group: values} for values in (one, other))
    assert hash_of(first) == hash_of(second)


def test_work_differs_where_the_key_was_read():
    sgd = WORK | {"optim": {"name": "sgd", "momentum": 0.9}}
    assert hash_of(sgd) != hash_of(WORK | {"optim": {"name": "sgd", "momentum": 0.0}})
    linear = {"name": "adamw", "schedule": "linear", "warmup_steps": 5}
    assert hash_of(WORK | {"optim": linear}) != hash_of(WORK | {"optim": linear | {"schedule": "cosine"}})
    strange = WORK | {"optim": {"name": ["sgd"], "momentum": {}, "warmup_steps": "x", "schedule": None}}
    assert unread({"optim.momentum": 1}, READ_WHEN) == set(), "the optimiser is not known"
    assert hash_of(strange) != hash_of(WORK)


def test_compare_puts_runs_that_differ_in_unread_keys_in_one_table(tmp_path):
    momentum = {"optim": WORK["optim"] | {"momentum": 0.9}}
    make_run(tmp_path, "dp")
    make_run(tmp_path, "tp", work=momentum)
    make_run(tmp_path, "fsdp", work={"optim": {**WORK["optim"], "beta1": 0.5}})
    same, other = groups_of(Search([tmp_path]).runs)
    assert {row.run.strategy for row in same.rows} == {"dp", "tp"}
    assert other.heading.endswith("optim.beta1 0.5, not none")


def test_compare_names_no_key_that_was_not_read(tmp_path):
    traced = {"metrics.trace": True, "metrics.profile_every": 0, "train.fp8_scaling": "tensorwise", "precision": "bf16"}
    other = traced | {"metrics.trace": False, "train.fp8_scaling": "rowwise"}
    assert configs.differences([traced, other]) == {}
    both = [{**one, "precision": "fp8"} for one in (traced, other)]
    assert configs.differences(both) == {"train.fp8_scaling": ["tensorwise", "rowwise"]}
    runs = Search([make_run(tmp_path, "dp"), make_run(tmp_path, "tp")]).runs
    for run, config in zip(runs, (traced, other), strict=True):
        run.config.update(config)
    assert "metrics.trace" not in unequal(runs)
