"""`strategy=auto`: the planner's best layout in the place of a strategy, in a run and in one that goes on."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.rows.auto import CHOSEN
from tests.test_launch_plan import H100, SMALL
from train.checkpoint.resume import planned
from train.command import cli
from train.command.planning import auto
from train.command.planning.hardware import FOLDER, file_named
from train.config.problems import BadInput
from train.config.world import World
from train.record.run_dir import command

REPO = Path(__file__).resolve().parent.parent


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


def test_auto_with_the_figures_of_the_device(monkeypatch):
    config = auto.standing([auto.WORD])

    def taken(device, nproc=2):
        hardware, calibrated = auto.figures(config, device, nproc)
        return hardware.name, hardware.memory_gib, calibrated

    profile = dataclasses.replace(file_named("measured/cpu_x2"), match="cpu")
    monkeypatch.setattr(auto, "measured", lambda given, device: [profile] if device == "cpu" else [])
    assert taken("cpu") == ("cpu_x2", None, True)
    assert taken("cpu", 3) == ("cpu_default", None, False), "no messages of three ranks were measured"
    assert taken("NVIDIA H100 80GB HBM3") == ("h100_sxm", 79.65, False)
    assert taken("NVIDIA L40S") == (auto.OTHER, file_named("l40s").memory_gib, False), "its own figures are too few"
    assert taken("an accelerator") == (auto.OTHER, 80.0, False)


def test_no_profile_is_shipped_that_strategy_auto_takes_by_itself():
    found = [file_named(f"measured/{path.stem}") for path in (FOLDER / "measured").glob("*.yaml")]
    assert len(found) >= 3 and all(one.match is None for one in found)


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


@pytest.mark.parametrize("line", ["launch.explain", "launch.sweep", "launch.local", "train.main"])
def test_help_needs_no_layout(line):
    words = [sys.executable, "-m", line, auto.WORD, "--help"]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.run(words, cwd=REPO, env=env, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "") and "strategy=single" in run.stdout


def test_where_auto_is_not_taken():
    with pytest.raises(BadInput, match="not taken here, only where a run is started: use the layout that"):
        cli.configured([auto.WORD])


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


@pytest.mark.slow
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
