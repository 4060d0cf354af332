"""`launch.plan` as a command: what it prints and what it refuses; and `strategy=auto`, which takes its best layout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from launch import plan
from launch.planning.figures import costs_of
from tests.plans import composed
from tests.rows.auto import CHOSEN
from train.checkpoint.resume import planned
from train.command import cli
from train.command.planning import auto
from train.config.problems import BadInput
from train.config.world import World
from train.record.run_dir import command

REPO = Path(__file__).resolve().parent.parent

SMALL = ["model=small", "train.seq_len=256", "train.global_batch_size=16"]
H100 = ["hardware=h100_sxm", "precision=bf16"]


@pytest.fixture
def run(monkeypatch, capsys):
    """(exit code, standard output, standard error) of a command line."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["launch.plan", *words])
        code = 0
        try:
            plan.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_what_is_printed(run):
    code, out, err = run(*SMALL, *H100, "nproc=4", "top=3", "tokens=1e9", "price=2")
    assert (code, err) == (0, "")
    for said in ("small on 4 x h100_sxm, 16 sequences of 256 tokens a step, bf16", "valid layouts", "80 % interval",
                 "messages over", "compute", "kept free", "a device has 79.65 GiB", "for 1,000,000,000 tokens",
                 "why not the second:", "python -m launch.local nproc=4 ", " strategy=zero1 "):  # fmt: skip
        assert said in out, said
    assert "lacks the figure" not in out


def test_as_json(run):
    code, out, _ = run(*SMALL, *H100, "nproc=4", "top=5", "tokens=1e9", "price=2", "--json")
    found = json.loads(out)
    assert code == 0 and len(found["layouts"]) == 5
    speeds = [one["tokens_per_s"] for one in found["layouts"]]
    assert speeds == sorted(speeds, reverse=True)
    for one in found["layouts"]:
        step = sum(one["step_s"].values())
        assert one["step_ms"] == pytest.approx(1e3 * step)
        assert one["tokens_per_s"] == pytest.approx(16 * 256 / step)
        assert one["low"] < one["tokens_per_s"] < one["high"]
        assert 0 < one["mfu_pct"] < 81, "of the data sheet's peak; the measured one is 80.3 % of it"
        assert sum(one["memory_bytes"].values()) < 79.65 * 2**30
        costs = one["costs"]
        assert costs["device_hours"] == pytest.approx(4 * 1e9 / one["tokens_per_s"] / 3600)
        assert (costs["usd"], costs["kwh"]) == (
            pytest.approx(2 * costs["device_hours"]),
            pytest.approx(0.7 * costs["device_hours"]),
        )


def test_several_precisions(run):
    code, out, _ = run(*SMALL, "hardware=h100_sxm", "precision=bf16,fp8", "nproc=2", "--json")
    found = json.loads(out)
    assert code == 0 and found["searched"].keys() == {"bf16", "fp8"}
    assert {one["products"] for one in found["layouts"]} <= {"bf16", "fp8"}


def test_figures_that_are_missing_are_named(run):
    code, out, _ = run(*SMALL, *H100, "nproc=2", "hardware.watts=null", "hardware.memory_gib=null")
    assert code == 0
    assert "left out, as hardware=h100_sxm lacks the figure: whether layouts fit (hardware.memory_gib), cost" in out
    assert "energy (hardware.watts)" in out
    costs = costs_of(composed("strategy=single", "hardware=l40s"), 2, 1e9, 1e6, None)
    assert costs.usd is None and costs.kwh is None


def test_the_batch_of_a_large_model(run):
    code, out, _ = run("model=llama_1b", *H100, "nproc=2", "top=1", "--json")
    found = json.loads(out)
    assert code == 0 and (found["seq_len"], found["global_batch_size"]) == (4096, 1024)
    code, out, _ = run("model=llama_1b", *H100, "nproc=2", "train.seq_len=2048", "train.global_batch_size=8", "--json")
    assert (json.loads(out)["seq_len"], json.loads(out)["global_batch_size"]) == (2048, 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("hardware=h200 nproc=8", "hardware=h200 does not name a preset"),
        ("nproc=0", "nproc=0 is not valid"),
        ("hardware=h100_sxm nproc=2 strategy=fsdp", "strategy=fsdp is given, but python -m launch.plan chooses"),
        ("hardware=h100_sxm nproc=2 strategy.tp=2", "strategy.tp=2 is given, but python -m launch.plan chooses"),
        ("hardware=l40s precision=bf16 nproc=2", "hardware=l40s lacks processors, exp_tera_per_s, link_gb_per_s"),
        ("hardware=h100_sxm nproc=2 precision=fp4", "fp4 is not a precision"),
        ("hardware=h100_sxm nproc=2 tokens=many", "tokens=many is not valid"),
        ("hardware=h100_sxm nproc=2 train.steps=0", "train.steps=0 is out of range"),
        ("hardware=h100_sxm nproc=7 model.num_layers=2", "train.global_batch_size=8 is not divisible"),
        ("model=llama_70b hardware=h100_sxm precision=bf16 nproc=4", "valid layouts of nproc=4 fits in hardware=h100"),
    ],
)
def test_what_is_refused(run, words, says):
    code, out, err = run(*words.split())
    assert (code, out) == (2, ""), err
    assert says in err and err.startswith("1 problem, nothing was trained:"), err
    assert "Traceback" not in err


def test_what_is_missing_is_said_in_gib(run):
    _, _, err = run("model=llama_70b", *H100, "nproc=4")
    assert "(79.65 GiB): the nearest, " in err and " GiB a device" in err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "usage: python -m launch.plan [nproc=4] [top=20]" in out and "[--json]" in out


def test_auto_composes_what_the_planner_found():
    words = [auto.WORD, *SMALL, *H100]
    choice = auto.choose(words, 4, "cpu")
    config = cli.configured(auto.in_place(words, choice.words))
    assert config.strategy.name in choice.lines[0] and "uncalibrated: run scripts/matmul.py" in choice.lines[0]
    assert len(choice.lines) == 2 and "valid layouts" in choice.lines[1]
    assert choice == auto.choose(words, 4, "cpu"), "a function of the words, the world and the figures"


def test_auto_keeps_what_is_typed():
    words = [auto.WORD, *SMALL, *H100, "train.micro_batch_size=2", "train.activation_checkpointing=full"]
    config = cli.configured(auto.in_place(words, auto.choose(words, 2, "cpu").words))
    assert (config.train.micro_batch_size, config.train.activation_checkpointing.value) == (2, "full")


def test_auto_with_the_figures_of_the_device():
    config = auto.standing([auto.WORD])
    assert auto.figures(config, "cpu")[0].name in (
        "cpu_default",
        *(x.name for x in auto.measured(config.hardware, "cpu")),
    )
    assert auto.figures(config, "NVIDIA H100 80GB HBM3")[0].name == "h100_sxm"
    assert auto.figures(config, "an accelerator")[0].name == auto.OTHER


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["strategy.tp=2"], "strategy.tp=2 is given, but strategy=auto chooses"),
        ([*H100, "hardware.memory_gib=0.001"], "fits in hardware=h100_sxm (0.001 GiB): the nearest"),
        (["train.global_batch_size=7", "model.num_layers=2", "train.seq_len=127"], "train.global_batch_size=7 is not"),
    ],
)
def test_auto_refuses(words, says):
    with pytest.raises(BadInput) as refused:
        auto.choose([auto.WORD, "model.num_kv_heads=1", "model.num_heads=1", *words], 4, "cpu")
    assert says in refused.value.report() and refused.value.exit_code == 2


@pytest.mark.parametrize("preset", CHOSEN)
def test_figures_decide_what_auto_chooses(preset):
    assert f"strategy={preset}" in CHOSEN[preset].overrides


def cut_off(folder, words, line):
    """The folder of a run of two processes that was cut off after a step that it had saved."""
    config, tree, _ = cli.parse(cli.parser("train/main.py", ""), [*words, f"metrics.dir={folder}"])
    run = folder / "fsdp-dp_shard2-ws2-abcdef"
    (run / "checkpoints" / "step-2").mkdir(parents=True)
    (run / "config.yaml").write_text(OmegaConf.to_yaml(tree, resolve=True))
    (run / "work.json").write_text(json.dumps({"command": line, "world_size": 2}))
    return config, run


def test_a_resumed_run_keeps_its_layout(tmp_path, monkeypatch, capsys):
    world = World(0, 0, 2, 2, from_torchrun=True)
    words = [auto.WORD, "runtime.device=cpu", "hardware=cpu_default", f"metrics.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train/main.py", *words])
    layout = [
        "strategy=fsdp",
        "strategy.zero_stage=2",
        "train.micro_batch_size=2",
        "train.activation_checkpointing=full",
    ]
    config, run = cut_off(tmp_path, layout, command(world))
    found = cli.configured(planned(words, world))
    assert f"keeps the layout of {run}" in capsys.readouterr().out
    assert (found.strategy, found.train) == (config.strategy, config.train)
    (run / "summary.json").write_text("{}")
    assert "keeps the layout" not in str(planned(words, world)) and "takes" in capsys.readouterr().out
    assert planned([*words, "--help"], world)[0] == auto.STANDS_IN


@pytest.mark.timeout(120)
def test_a_run_with_auto(tmp_path):
    line = [sys.executable, "-m", "launch.local", "nproc=2", auto.WORD, "train.steps=2", "train.eval_every=0",
            "train.eval_batches=1", "runtime.device=cpu", "checkpoint.every=0", f"metrics.dir={tmp_path}"]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    run = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=110)
    assert run.returncode == 0, run.stderr
    (said,) = [line for line in run.stdout.splitlines() if line.startswith("strategy=auto takes")]
    (summary,) = tmp_path.glob("*/summary.json")
    found = json.loads(summary.read_text())
    assert f"takes {found['strategy']}: " in said and found["strategy"] != "auto"
    assert f"strategy {found['strategy']} on 2 process(es)" in run.stdout


def test_where_nothing_fits_nothing_is_started(tmp_path):
    line = [sys.executable, "-m", "launch.local", "nproc=2", auto.WORD, "hardware=cpu_default",
            "hardware.memory_gib=0.001", f"metrics.dir={tmp_path}/runs"]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (2, ""), run.stderr
    assert "fits in hardware=cpu_default (0.001 GiB): the nearest" in run.stderr
    assert not (tmp_path / "runs").exists()
